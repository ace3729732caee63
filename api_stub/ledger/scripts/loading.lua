-- A worker begins to load the model that it is going to serve.
note_known(ARGV[1])
return 1

-- One consistent read of a job.
return view(ARGV[1])

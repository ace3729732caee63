-- Asks for the end of one job.
local id = unpack(ARGV)
return cancel(id, read(id, 'status', 'model', 'list', 'tenant', 'worker', 'attempt', 'started_seq'))

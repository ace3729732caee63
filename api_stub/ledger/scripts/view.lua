-- One consistent read of a job.
local id = unpack(ARGV)
local row = read(id, 'status', 'task', 'model', 'priority', 'tenant', 'attempt', 'created', 'started', 'finished', 'worker', 'cancel', 'final')
if not row.status then
  return false
end
local num_workers = redis.call('ZCOUNT', KEY.workers .. row.model, '(' .. stamp, '+inf')
return {row.status, row.task, row.model, row.priority, row.tenant, row.attempt, row.created, row.started or '', row.finished or '',
  row.worker or '', row.cancel or '', row.final or '', num_workers}

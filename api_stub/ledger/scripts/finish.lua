-- in_progress -> final by the worker that holds the job: row, Celery result and final event in one step, once.
local id, fence, status, fragment, outcome = unpack(ARGV)
local row = read(id, 'status', 'fence', 'model', 'list', 'tenant', 'worker', 'attempt', 'finished_by')
if row.status == 'in_progress' and row.fence == fence then
  final(id, row, status, fragment, outcome)
  redis.call('HSET', KEY.job .. id, 'finished_by', fence)
  return 'done'
end
return row.finished_by == fence and 'already' or 'lost'

-- in_progress -> final by the worker that holds the job: row, Celery result and final event in one step, once.
local id, fence, status, fragment, outcome = unpack(ARGV)

-- The last member of the result of a job with a prompt. A member of its metadata is followed by two braces.
local function without_checkpoint(json)
  return (string.gsub(json, ',"checkpoint":"[%x+]+"}$', '}'))
end

local row = read(id, 'status', 'fence', 'model', 'list', 'tenant', 'worker', 'attempt', 'finished_by', 'v')
if row.status == 'in_progress' and row.fence == fence then
  if status == 'completed' and not may_tell_checkpoint(row) then
    fragment, outcome = without_checkpoint(fragment), without_checkpoint(outcome)
  end
  final(id, row, status, fragment, outcome)
  redis.call('HSET', KEY.job .. id, 'finished_by', fence)
  return 'done'
end
return row.finished_by == fence and 'already' or 'lost'

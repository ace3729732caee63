-- What `view` and `list_jobs` tell about a job.

-- How many doorbells are answered before this one: those of more urgent lists, and those that came earlier to its own.
local function position(id, row)
  local rank = redis.call('ZRANK', KEY.waiting .. row.list, id)
  if row.status ~= 'queued' or not rank then
    return ''
  end
  local model, step = string.match(row.list, '^(.*):(%d+)$')
  for other, place in pairs(STEP) do
    if place < STEP[step] then
      rank = rank + redis.call('ZCARD', KEY.waiting .. model .. ':' .. other)
    end
  end
  return rank
end

local function view(id)
  local row = read(id, 'status', 'task', 'model', 'priority', 'tenant', 'attempt', 'created', 'started', 'finished', 'worker',
    'cancel', 'final', 'list')
  if not row.status then
    return false
  end
  local num_workers = redis.call('ZCOUNT', KEY.workers .. row.model, '(' .. stamp, '+inf')
  return {id, row.status, row.task, row.model, row.priority, row.tenant, row.attempt, row.created, row.started or '',
    row.finished or '', row.worker or '', row.cancel or '', row.final or '', position(id, row), num_workers}
end

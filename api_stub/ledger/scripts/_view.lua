-- What `view` and `list_jobs` answer about a job.

local function num_waiting(list)
  return redis.call('ZCARD', KEY.waiting .. list)
end

-- How many jobs of its own list come before a held one, when every tenant's line is long enough to use its turns.
local function held_before(id, row)
  local place = redis.call('ZRANK', line_of(row.list, row.tenant), id)
  if not place then
    return nil
  end
  local num_lines = redis.call('ZCARD', KEY.turns .. row.list)
  local turn = redis.call('ZRANK', KEY.turns .. row.list, row.tenant) or num_lines
  local num_held = tonumber(redis.call('HGET', KEY.num_held, row.list) or '0')
  return num_waiting(row.list) + math.min(place * math.max(1, num_lines) + turn, num_held - 1)
end

-- How many jobs come before this one: those of more urgent lists, and of its own those that are earlier or whose turn is.
local function position(id, row)
  if row.status ~= 'queued' then
    return ''
  end
  local rank = redis.call('ZRANK', KEY.waiting .. row.list, id) or held_before(id, row)
  if not rank then
    return ''
  end
  local model, step = string.match(row.list, '^(.*):(%d+)$')
  for other, place in pairs(STEP) do
    if place < STEP[step] then
      local list = model .. ':' .. other
      rank = rank + num_waiting(list) + tonumber(redis.call('HGET', KEY.num_held, list) or '0')
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
    row.finished or '', row.worker or '', row.cancel or '', row.final or '', position(id, row), num_workers,
    row.status == 'queued' and is_paused(row.model) and 1 or ''}
end

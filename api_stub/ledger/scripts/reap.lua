-- One sweep: ended leases, passed deadlines, retries that are due, lost doorbells. It costs what is due, not what exists. Any number
-- of reapers may sweep at the same time; to one that passes a `pause_s`, anybody's sweep that is younger counts as its own.
-- Answers whether more is due, then id, task, model and priority of every job that it rang for.
-- So many jobs, and so many lists, that a sweep takes at most some milliseconds of Redis' time; the rest is the next one's.
local BATCH = 100
local MAX_LISTS = 10
local MAX_DEAD = 10000
local reply = {0}
local pause_s = tonumber(ARGV[1])

go_on_when_full()
local seconds = watch()
-- Who sweeps by other settings than others do treats their jobs differently: `visionq doctor` looks for more than one.
redis.call('ZREMRANGEBYSCORE', KEY.settings, '-inf', stamp)
redis.call('ZADD', KEY.settings, moment(now + CONFIG.lease_s), SHARED.settings)
redis.call('PEXPIRE', KEY.settings, math.ceil(CONFIG.lease_s * 1000))
if pause_s > 0 then
  local last = tonumber(redis.call('GET', KEY.sweep) or '0') or 0
  if now >= last and now < last + pause_s then -- a last sweep in the future is one before the clock was set back
    return reply
  end
  redis.call('SET', KEY.sweep, stamp, 'PX', math.ceil(pause_s * 1000))
end

local function ring_again(id, row)
  if is_paused(row.model) then
    return hold(id, row)
  end
  ring(id, row)
  for _, field in ipairs({id, row.task or '', row.model, row.priority}) do
    reply[#reply + 1] = field
  end
end

local function has_passed(time)
  return time and now >= tonumber(time)
end

local function list_is_empty(list)
  return redis.pcall('LLEN', (broker_list(list))) == 0 -- a key of another type is none, and stops no sweep
end

local function watermark(list)
  return redis.call('GET', KEY.watermark .. list) or '0'
end

local function take_from_lost_worker(id, row)
  local has_kept = row.kept_by == row.attempt -- its work is not lost: it costs no life
  local losses = has_kept and 0 or redis.call('HINCRBY', KEY.job .. id, 'losses', 1)
  count('lost')
  if row.cancel then
    unanswered(id, row, 'cancelled', 'cancelled', 'cancelled while it was running; its worker was lost')
  elseif has_passed(row.deadline) then
    unanswered(id, row, 'failed', 'deadline_exceeded', string.format(
      'deadline_s: %.6g s passed while the job was running; its worker was lost', tonumber(row.deadline) - tonumber(row.created)))
  elseif losses >= CONFIG.max_attempts then
    redis.call('LPUSH', KEY.dead, id)
    redis.call('LTRIM', KEY.dead, 0, MAX_DEAD - 1)
    local where = row.kept and ' since its checkpoint at step ' .. row.kept or ''
    unanswered(id, row, 'failed', 'poison_job', string.format(
      'given up after %d workers were lost while they held it%s, the limit is %d', losses, where, CONFIG.max_attempts))
  else
    requeue(id, row, 'lost', 0)
    ring_again(id, row)
    make_room(row)
  end
end

local function look_at_running(id, row)
  local left_s = tonumber(row.lease or '0') - seconds
  if left_s > 0 then
    redis.call('ZADD', KEY.due, moment(now + left_s), id) -- nobody could beat for a while
  else
    take_from_lost_worker(id, row)
  end
end

local function look_at_queued(id, row)
  if has_passed(row.deadline) then
    expire(id, row)
  elseif not has_passed(row.alarm) then
    schedule(id, tonumber(row.alarm), tonumber(row.deadline))
  elseif row.bell == '0' or list_is_empty(row.list) or tonumber(row.bell) < tonumber(watermark(row.list)) then
    ring_again(id, row)
  else
    await_doorbell(id, row, row.bell) -- it had only been late
  end
end

local due = redis.call('ZRANGEBYSCORE', KEY.due, '-inf', stamp, 'LIMIT', 0, BATCH)
for _, id in ipairs(due) do
  redis.call('ZREM', KEY.due, id)
  local row = read(id, 'status', 'task', 'model', 'priority', 'list', 'created', 'deadline', 'attempt', 'started_seq', 'cancel',
    'bell', 'alarm', 'lease', 'tenant', 'worker', 'place', 'kept', 'kept_by')
  if row.status == 'in_progress' then
    look_at_running(id, row)
  elseif row.status == 'queued' then
    look_at_queued(id, row)
  end
end

-- When a queued job ends if no worker of its model has been there since. Nobody is missed while an operator pauses the queue.
local function unserved_until(row)
  local served = (is_served(row.model) or is_paused(row.model)) and now or tonumber(redis.call('ZSCORE', KEY.known, row.model) or '0')
  return math.max(tonumber(row.created), served) + CONFIG.unserved_ttl_s
end

-- Ends a queued job of a model that nobody has served for too long; of one that somebody serves, looks again when it may be too long.
local function look_at_unserved(id)
  local row = read(id, 'status', 'model', 'list', 'tenant', 'worker', 'attempt', 'started_seq', 'created')
  if row.status ~= 'queued' and row.status ~= 'in_progress' then
    return
  end
  local ends = unserved_until(row)
  if row.status == 'queued' and now >= ends then
    count('unserved')
    unanswered(id, row, 'expired', 'expired', string.format(
      'no worker has served the model %s for %.6g s (VISIONQ_UNSERVED_TTL_S); '
        .. 'check the name, or start a worker for it and submit again',
      quote(row.model), CONFIG.unserved_ttl_s))
    forget_doorbell(id, row)
  else
    local again_at = ends > now and ends or now + CONFIG.unserved_ttl_s / 10 -- the latter for one that runs now
    redis.call('ZADD', KEY.unserved, moment(again_at), id)
  end
end

local unserved = redis.call('ZRANGEBYSCORE', KEY.unserved, '-inf', stamp, 'LIMIT', 0, BATCH)
for _, id in ipairs(unserved) do
  redis.call('ZREM', KEY.unserved, id) -- first: a row that somebody broke stops one sweep, not all
  look_at_unserved(id)
end
redis.call('ZREMRANGEBYSCORE', KEY.known, '-inf', moment(now - math.max(KNOWN_S, CONFIG.unserved_ttl_s)))

-- Takes a job without a row out of its list. Only the lists of the tenants' jobs say whose it was.
local function forget_waiting(id, list)
  local model = string.match(list, '^(.*):%d+$')
  redis.call('ZREM', KEY.waiting .. list, id)
  forget(id, model)
  local counts = redis.call('HGETALL', KEY.tenants .. model)
  for i = 1, #counts, 2 do
    if redis.call('ZREM', KEY.jobs .. counts[i], id) == 1 then
      add_in_flight({model = model, tenant = counts[i]}, -1)
    end
  end
end

-- A waiting job whose list is empty, or whose list has served later doorbells, has probably lost its own. It may also be between
-- list and claim just now, so it is looked at once more after a grace. Jobs that merely wait for their turn cost nothing here.
local function find_suspects(list)
  local limit = list_is_empty(list) and '+inf' or '(' .. watermark(list)
  local suspects = redis.call('ZRANGEBYSCORE', KEY.waiting .. list, '-inf', limit, 'LIMIT', 0, BATCH)
  for _, id in ipairs(suspects) do
    local row = read(id, 'status', 'model', 'tenant', 'deadline')
    row.list = list
    if row.status then
      stop_waiting(id, row)
      redis.call('HSET', KEY.job .. id, 'alarm', moment(now + CONFIG.grace_s))
      schedule(id, now + CONFIG.grace_s, tonumber(row.deadline))
    else
      forget_waiting(id, list)
    end
  end
  return #suspects
end

-- The job at the head of a list that is not the first, when it has waited long enough: the longest wait of each model. Nobody
-- waits in vain where no worker takes any; the first beat of one has the lists looked at.
local aged = {}

local function find_aged(list)
  local model, step = string.match(list, '^(.*):(%d+)$')
  local is_served = step ~= '0' and redis.call('EXISTS', KEY.workers .. model) == 1 and not is_paused(model)
  local id = is_served and redis.call('ZRANGE', KEY.waiting .. list, 0, 0)[1]
  if not id then
    return
  end
  local queued_at = tonumber(redis.call('HGET', KEY.job .. id, 'queued_at') or stamp) -- a row that is gone stops no sweep
  if now - queued_at >= CONFIG.ageing_s and (not aged[model] or queued_at < aged[model].queued_at) then
    aged[model] = {id = id, list = list, queued_at = queued_at}
  end
end

-- Moves an aged job into its model's first list. One at a time, so that the urgent jobs stay ahead of all the aged ones together.
local function let_in_front(model, oldest)
  if redis.call('EXISTS', KEY.workers .. model) == 1 then
    mark_for_sweep(oldest.list) -- whose next job may have waited too long as well
  end
  local id, first = oldest.id, model .. ':0'
  local former = redis.call('GET', KEY.aged .. model)
  if former and redis.call('ZSCORE', KEY.waiting .. first, former) then
    return
  end
  local row = read(id, 'task', 'model', 'priority', 'tenant', 'deadline')
  row.list = oldest.list
  stop_waiting(id, row)
  row.list = first
  -- Its doorbell in the former list is still there and may be the faster one: it must overtake nobody here, so order is 0.
  redis.call('HSET', KEY.job .. id, 'list', first, 'order', 0)
  ring(id, row)
  redis.call('SET', KEY.aged .. model, id, 'EX', 86400)
  release(oldest.list)
end

-- Workers of 0.1.0 beat without asking for a look at what waits for them: another one when a lease is over.
local function look_again_while_served(list)
  local model = string.match(list, '^(.*):%d+$')
  if is_served(model) and redis.call('EXISTS', KEY.waiting .. list, KEY.turns .. list) > 0 then
    note_known(model)
    redis.call('ZADD', KEY.serving, 'NX', moment(now + CONFIG.lease_s), model)
  end
end

for _, model in ipairs(redis.call('ZRANGEBYSCORE', KEY.serving, '-inf', stamp, 'LIMIT', 0, MAX_LISTS)) do
  redis.call('ZREM', KEY.serving, model)
  mark_lists_for_sweep(model)
end
local is_more = #due == BATCH or #unserved == BATCH

local looked_at = {}

local function look_at(list)
  if find_suspects(list) == BATCH then
    mark_for_sweep(list)
    is_more = true
  end
  looked_at[string.match(list, '^(.*):%d+$')] = true
  find_aged(list)
  look_again_while_served(list)
end

local news = redis.call('ZPOPMIN', KEY.news, MAX_LISTS)
is_more = is_more or #news == 2 * MAX_LISTS
for i = 1, #news, 2 do
  look_at(news[i])
end

-- Beside processes of 0.1.0, and for a while after them, a sweep does what theirs do: it looks at every list that has jobs.
local ours, others = unpack(redis.call('HMGET', KEY.watch, 'ours', 'others'))
local theirs = string.format('%.0f', tonumber(redis.call('GET', KEY.submitted) or '0') - tonumber(ours or '0'))
if theirs ~= (others or '0') then
  redis.call('HSET', KEY.watch, 'others', theirs)
  note_older()
end
if is_beside_older() then
  for _, list in ipairs(redis.call('SMEMBERS', KEY.lists)) do
    look_at(list)
    local model = string.match(list, '^(.*):%d+$')
    if (redis.call('GET', KEY.depth .. model) or '0') == '0' then
      redis.call('SREM', KEY.lists, list)
      redis.call('DEL', KEY.watermark .. list)
    end
  end
end
for model, oldest in pairs(aged) do
  let_in_front(model, oldest)
end
-- Last: a suspect in one list may have been what kept its tenant's jobs in another back.
for model in pairs(looked_at) do
  for step in pairs(STEP) do
    release(model .. ':' .. step)
  end
end
reply[1] = is_more and 1 or 0
return reply

-- Queued jobs: whose doorbell is in the broker's list, who is held back, whose turn it is.
--
-- Doorbells are written by these scripts alone, in the step that queues the job or finds its doorbell lost. Only a few of each
-- list are out at a time (`waiting`). The other jobs are held, one line per tenant, and whenever there is room the first of the
-- line whose turn it is gets its doorbell. So nobody waits behind another's backlog. A tenant at its cap takes no turns until one
-- of its jobs leaves. Of a paused model all jobs are held, and no doorbell is written.

-- When must a reaper look at a queued job: at its alarm or at its deadline, whichever comes first.
local function schedule(id, alarm, deadline)
  local due = alarm and deadline and math.min(alarm, deadline) or alarm or deadline
  if due then
    redis.call('ZADD', KEY.due, moment(due), id)
  else
    redis.call('ZREM', KEY.due, id)
  end
end

local function line_of(list, tenant)
  return KEY.held .. list .. ':' .. tenant
end

-- Since when nobody may claim jobs of this model; nothing when they may.
local function is_paused(model)
  return redis.call('HGET', KEY.paused, model)
end

-- A tenant's jobs of one model that run or whose doorbells are out.
local function in_flight(model, tenant)
  return tonumber(redis.call('HGET', KEY.tenants .. model, tenant) or '0')
end

local function is_at_cap(num)
  return CONFIG.tenant_max_running > 0 and num >= CONFIG.tenant_max_running
end

local function is_capped(model, tenant)
  return tenant ~= '' and CONFIG.tenant_max_running > 0 and is_at_cap(in_flight(model, tenant))
end

local function take_turns(list, tenant)
  if not redis.call('ZSCORE', KEY.turns .. list, tenant) then
    redis.call('ZADD', KEY.turns .. list, redis.call('INCR', KEY.turn), tenant)
  end
end

local function add_in_flight(row, num)
  if row.tenant == '' then
    return
  end
  if redis.call('HINCRBY', KEY.tenants .. row.model, row.tenant, num) <= 0 then
    redis.call('HDEL', KEY.tenants .. row.model, row.tenant)
  end
  if num < 0 then
    for step in pairs(STEP) do
      local list = row.model .. ':' .. step
      if redis.call('EXISTS', line_of(list, row.tenant)) == 1 then
        take_turns(list, row.tenant)
      end
    end
  end
end

-- The next sweep looks at this list.
local function mark_for_sweep(list)
  redis.call('ZADD', KEY.news, 'NX', stamp, list)
end

-- The next sweep looks at the lists of a model that keep jobs waiting. Whoever takes messages may lose them without a word, so this
-- is asked for as long as workers are there, and once more when they are gone.
local function mark_lists_for_sweep(model)
  for step in pairs(STEP) do
    local list = model .. ':' .. step
    if redis.call('EXISTS', KEY.waiting .. list, KEY.turns .. list) > 0 then
      mark_for_sweep(list)
    end
  end
end

-- The model has one queued or running job less. Nothing is kept of a model that has none.
local function one_less(model)
  if redis.call('DECR', KEY.depth .. model) <= 0 then
    local lists, watermarks = {}, {}
    for step in pairs(STEP) do
      lists[#lists + 1] = model .. ':' .. step
      watermarks[#watermarks + 1] = KEY.watermark .. model .. ':' .. step
    end
    redis.call('DEL', unpack(watermarks))
    redis.call('SREM', KEY.lists, unpack(lists))
    redis.call('ZREM', KEY.news, unpack(lists))
  end
end

-- From now on a doorbell with this number is expected in the job's list.
local function await_doorbell(id, row, bell)
  redis.call('HSET', KEY.job .. id, 'bell', bell)
  redis.call('HDEL', KEY.job .. id, 'alarm', 'not_before')
  if redis.call('ZADD', KEY.waiting .. row.list, bell, id) == 1 then
    add_in_flight(row, 1)
  end
  redis.call('SADD', KEY.lists, row.list)
  mark_for_sweep(row.list)
  schedule(id, nil, tonumber(row.deadline))
end

local function stop_waiting(id, row)
  if redis.call('ZREM', KEY.waiting .. row.list, id) == 1 then
    add_in_flight(row, -1)
  end
end

-- The broker's list of a priority list, and the message that a Celery producer would put there.
local function broker_list(list)
  local model, step = string.match(list, '^(.*):(%d+)$')
  return KEY.queue .. model .. (step == '0' and '' or KEY.separator .. step), model
end

local function doorbell(id, row, bell)
  local key, model = broker_list(row.list)
  local values = {id = quote(id), task = quote((row.task or '') ~= '' and row.task or DOORBELL.task), priority = row.priority,
    queue = quote(KEY.queue .. model), tag = quote(id .. '#' .. bell)}
  return key, (string.gsub(DOORBELL.message, '<(%l+)>', values))
end

-- Writes the job's doorbell and answers its number, which is `bell` or a new one. `row` needs: task model list tenant priority
-- deadline.
local function ring(id, row, bell)
  bell = bell or next_number()
  await_doorbell(id, row, bell)
  redis.call('LPUSH', doorbell(id, row, bell))
  count('rung')
  return bell
end

-- Puts a queued job into its tenant's line.
local function hold(id, row)
  local place = row.place or redis.call('HGET', KEY.job .. id, 'order') or 0
  if redis.call('ZADD', line_of(row.list, row.tenant), place, id) == 1 then
    redis.call('HINCRBY', KEY.num_held, row.list, 1)
  end
  redis.call('HDEL', KEY.job .. id, 'bell', 'alarm', 'not_before')
  redis.call('SADD', KEY.lists, row.list)
  mark_for_sweep(row.list)
  if not is_capped(row.model, row.tenant) then
    take_turns(row.list, row.tenant)
  end
  schedule(id, nil, tonumber(row.deadline))
end

local function forget_held(list, num)
  if redis.call('HINCRBY', KEY.num_held, list, -num) <= 0 then
    redis.call('HDEL', KEY.num_held, list)
  end
end

local function leave_line(id, row)
  local line = line_of(row.list, row.tenant)
  if redis.call('ZREM', line, id) == 1 then
    forget_held(row.list, 1)
    if redis.call('EXISTS', line) == 0 then
      redis.call('ZREM', KEY.turns .. row.list, row.tenant)
    end
  end
end

-- A queued job whose row somebody has taken away: nobody can end it any more. Writing to it would leave a part of a row for ever.
local function forget(id, model)
  one_less(model)
  redis.call('ZREM', KEY.unserved, id)
  redis.call('EXPIRE', KEY.events .. id, CONFIG.events_ttl_s)
  count('forgotten')
end

-- How many more doorbells may be in a list. More than workers can take before the next claim would only delay urgent jobs and other
-- tenants' jobs.
local function room(list)
  local model = string.match(list, '^(.*):%d+$')
  return math.max(CONFIG.window, 2 * redis.call('ZCARD', KEY.workers .. model)) - redis.call('ZCARD', KEY.waiting .. list)
end

local function ring_next(list, model, tenant)
  local line = line_of(list, tenant)
  local id = redis.call('ZPOPMIN', line)[1]
  if id then
    forget_held(list, 1)
    local row = read(id, 'status', 'task', 'priority', 'deadline')
    row.list, row.model, row.tenant = list, model, tenant
    if row.status then
      redis.call('HSET', KEY.job .. id, 'order', ring(id, row))
    else
      forget(id, model)
    end
  end
  if redis.call('EXISTS', line) == 0 then
    redis.call('ZREM', KEY.turns .. list, tenant)
  else
    redis.call('ZADD', KEY.turns .. list, redis.call('INCR', KEY.turn), tenant)
  end
  return id
end

-- Rings for held jobs of one list, tenant by tenant, while there is room.
local function release(list)
  if redis.call('EXISTS', KEY.turns .. list) == 0 then
    return
  end
  local model = string.match(list, '^(.*):%d+$')
  local num = is_paused(model) and 0 or room(list)
  while num > 0 do
    local tenant = redis.call('ZRANGE', KEY.turns .. list, 0, 0)[1]
    if not tenant then
      return
    elseif is_capped(model, tenant) then
      redis.call('ZREM', KEY.turns .. list, tenant)
    elseif ring_next(list, model, tenant) then
      num = num - 1
    end
  end
end

-- After a job has left the queue or stopped running: whoever it kept waiting may go on.
local function make_room(row)
  if row.tenant == '' then
    return release(row.list)
  end
  for step in pairs(STEP) do
    release(row.model .. ':' .. step)
  end
end

-- A job with one attempt left runs on no worker beside another job that has lost a worker: when that worker dies, too, it is
-- certain which of them is the poison job.
local MANY_LOSSES = math.max(1, CONFIG.max_attempts - 1)

local function must_run_elsewhere(id, row, worker)
  if row.losses == '0' then
    return false
  end
  for _, other in ipairs(redis.call('SMEMBERS', KEY.suspects .. worker)) do
    local losses = tonumber(redis.call('HGET', KEY.job .. other, 'losses') or '0')
    if math.max(losses, tonumber(row.losses)) >= MANY_LOSSES then
      return true
    end
  end
  return false
end

local function begin_running(id, row, worker)
  add_in_flight(row, 1)
  if row.losses ~= '0' then
    redis.call('SADD', KEY.suspects .. worker, id)
  end
end

local function stop_running(id, row)
  add_in_flight(row, -1)
  redis.call('SREM', KEY.suspects .. row.worker, id)
end

-- No doorbell announces the job until a sweep rings, after `delay_s`.
local function postpone(id, row, delay_s)
  local again_at = now + delay_s
  redis.call('HSET', KEY.job .. id, 'bell', 0, 'alarm', moment(again_at), 'not_before', moment(again_at))
  schedule(id, again_at, tonumber(row.deadline))
end

-- Ends an attempt without ending the job. `row` needs: model list tenant worker attempt deadline.
local function requeue(id, row, reason, delay_s)
  redis.call('HSET', KEY.job .. id, 'status', 'queued', 'queued_at', stamp)
  redis.call('HDEL', KEY.job .. id, 'worker', 'token', 'lease')
  postpone(id, row, delay_s)
  stop_running(id, row)
  emit(id, row.attempt, '"type":"job.retrying","reason":' .. quote(reason))
end

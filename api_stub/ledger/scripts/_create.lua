-- A new row, queued, and its first event.

-- The index that `list_jobs` reads: bounded in number, cleared of expired rows as new ones come, and gone when no job has come for
-- as long as a row could be kept that waited no longer than a deadline may be.
local MAX_LISTED = 100000
local MAX_WAIT_S = 7 * 86400

-- After all that the tenant has, also while the clock stands still: pages end between two jobs.
local function place_among(key)
  local newest = redis.call('ZREVRANGEBYSCORE', key, '+inf', stamp, 'WITHSCORES', 'LIMIT', 0, 1)[2]
  return newest and moment(tonumber(newest) + 1e-6) or stamp
end

local function list_under(tenant, id)
  local key = KEY.jobs .. tenant
  redis.call('ZADD', key, place_among(key), id)
  redis.call('EXPIRE', key, CONFIG.result_ttl_s + MAX_WAIT_S)
  redis.call('ZREMRANGEBYRANK', key, 0, -MAX_LISTED - 1)
  local expired = moment(now - CONFIG.result_ttl_s) -- a younger one without a row is one that a sweep has to forget
  for _, oldest in ipairs(redis.call('ZRANGE', key, '-inf', expired, 'BYSCORE', 'LIMIT', 0, 2)) do
    if redis.call('EXISTS', KEY.job .. oldest) == 0 then
      redis.call('ZREM', key, oldest)
    end
  end
end

local function announce(id)
  local event, fragment = queued_event(id)
  if is_beside_older() then
    append(id, 1, event) -- whose claims begin with the second event, and whose readers know the stream alone
  end
  publish(id, event)
  enqueue_delivery(id, 1, event, fragment)
end

-- `job` needs: digest body task model priority list tenant deadline_s (empty: none) hook_url hook_events adapter (empty: none).
local function create(id, job)
  local row = {list = job.list, model = job.model, tenant = job.tenant, task = job.task, priority = job.priority,
    deadline = job.deadline_s ~= '' and moment(now + tonumber(job.deadline_s)) or nil,
    place = next_number()}
  redis.call('HSET', KEY.job .. id, 'status', 'queued', 'task', job.task, 'model', job.model, 'priority', job.priority,
    'list', job.list, 'tenant', job.tenant, 'body', job.body, 'digest', job.digest, 'created', stamp, 'queued_at', stamp,
    'seq', 1, 'attempt', 0, 'losses', 0, 'retries', 0, 'v', 2)
  if job.tenant ~= '' then
    redis.call('HSET', KEY.job .. id, 'place', row.place)
  end
  if row.deadline then
    redis.call('HSET', KEY.job .. id, 'deadline', row.deadline)
  end
  if (job.hook_url or '') ~= '' then
    redis.call('HSET', KEY.job .. id, 'hook_url', job.hook_url, 'hook_events', job.hook_events)
  end
  if (job.adapter or '') ~= '' then
    redis.call('HSET', KEY.job .. id, 'adapter', job.adapter)
  end
  redis.call('DEL', KEY.events .. id, KEY.result .. id) -- left over from a job of this id whose row has expired
  redis.call('INCR', KEY.depth .. job.model)
  redis.call('ZADD', KEY.unserved, moment(now + CONFIG.unserved_ttl_s), id)
  list_under(job.tenant, id)
  announce(id)
  return row
end

-- kombu's rule: a priority goes to the highest step not above it.
local function step_of(priority)
  local highest = 0
  for step in pairs(STEP) do
    highest = tonumber(step) <= tonumber(priority) and math.max(highest, tonumber(step)) or highest
  end
  return string.format('%d', highest)
end

local function is_full(model)
  local depth = tonumber(redis.call('GET', KEY.depth .. model) or '0')
  return CONFIG.max_queued > 0 and depth >= CONFIG.max_queued, depth
end

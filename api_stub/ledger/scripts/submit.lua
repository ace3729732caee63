-- Writes a new job: from our client, with its doorbell unless the job is held, or adopted from a plain Celery message, which is its
-- doorbell. `former`: SHA-1 of the body as 0.1.0 wrote it, whose digests distinguish fewer bodies.
local id, digest, body, task, model, priority, list, tenant, deadline_s, origin, hook_url, hook_events, former, links, adapter
  = unpack(ARGV)

local known, stored = unpack(redis.call('HMGET', KEY.job .. id, 'digest', 'body'))
if known then
  local is_other = known ~= digest and redis.sha1hex(stored or '') ~= former
  local is_held = redis.call('ZSCORE', line_of(list, tenant), id)
  return {is_other and 'conflict' or is_held and 'held' or 'same'}
end
local is_refused, depth = is_full(model)
if origin == 'client' and is_refused then
  return {'full', CONFIG.max_queued, depth}
end

-- A tenant's jobs wait under so many names that nobody serves or has served; those of which no job is left make room. Jobs without a
-- tenant are the operator's own.
local MAX_STRANGE = 100

local function may_name(model, tenant)
  local key = KEY.strange .. tenant
  if is_known(model) or redis.call('ZSCORE', key, model) then
    return true
  end
  local free = {}
  if redis.call('ZCARD', key) >= MAX_STRANGE then
    for _, name in ipairs(redis.call('ZRANGE', key, 0, -1)) do
      if is_known(name) or (redis.call('GET', KEY.depth .. name) or '0') == '0' then
        free[#free + 1] = name
      end
    end
    if #free == 0 then
      return false
    end
  end
  redis.call('ZADD', key, stamp, model)
  redis.call('EXPIRE', key, 2 * CONFIG.unserved_ttl_s)
  for _, name in ipairs(free) do
    redis.call('ZREM', key, name)
    if redis.call('GET', KEY.depth .. name) == '0' then
      redis.call('DEL', KEY.depth .. name)
    end
  end
  return true
end

if origin == 'client' and tenant ~= '' and not may_name(model, tenant) then
  return {'strange', MAX_STRANGE}
end

local row = create(id, {digest = digest, body = body, task = task, model = model, priority = priority, list = list,
  tenant = tenant, deadline_s = deadline_s, hook_url = hook_url, hook_events = hook_events, adapter = adapter})
count(origin == 'client' and 'submitted' or 'adopted')

if origin ~= 'client' then
  -- Nobody knows when its message was pushed, so it says nothing about the messages behind it: order is 0.
  redis.call('HSET', KEY.job .. id, 'order', 0, 'place', row.place, 'bell', 0, 'alarm', moment(now + CONFIG.grace_s))
  schedule(id, now + CONFIG.grace_s, tonumber(row.deadline))
  if links ~= '' then
    redis.call('HSET', KEY.job .. id, 'links', links)
    look_at_links(id)
  end
  return {'created'}
end
if room(list) <= 0 or redis.call('EXISTS', KEY.turns .. list) == 1 or is_capped(model, tenant) or is_paused(model) then
  hold(id, row)
  release(list)
  return {'held'}
end
redis.call('HSET', KEY.job .. id, 'order', ring(id, row, row.place))
return {'created'}

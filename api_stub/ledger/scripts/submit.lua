-- Writes a new job: from our client (its doorbell follows) or adopted from a plain Celery message (its doorbell is in hand).
local id, digest, body, task, model, priority, list, tenant, deadline_s, origin = unpack(ARGV)

local known = redis.call('HGET', KEY.job .. id, 'digest')
if known then
  return {known == digest and 'same' or 'conflict'}
end
local depth = tonumber(redis.call('GET', KEY.depth .. model) or '0')
if origin == 'client' and CONFIG.max_queued > 0 and depth >= CONFIG.max_queued then
  return {'full', CONFIG.max_queued, depth}
end

local row = {list = list, deadline = deadline_s ~= '' and moment(now + tonumber(deadline_s)) or nil}
redis.call('HSET', KEY.job .. id, 'status', 'queued', 'task', task, 'model', model, 'priority', priority, 'list', list,
  'tenant', tenant, 'body', body, 'digest', digest, 'created', stamp, 'queued_at', stamp, 'seq', 0, 'attempt', 0, 'losses', 0,
  'order', 0, 'bell', 0)
if row.deadline then
  redis.call('HSET', KEY.job .. id, 'deadline', row.deadline)
end
redis.call('DEL', KEY.events .. id, KEY.result .. id) -- left over from a job of this id whose row has expired
redis.call('INCR', KEY.depth .. model)
list_under(tenant, id)
emit(id, 0, '"type":"job.queued","model":' .. quote(model) .. ',"priority":' .. priority)

if origin == 'client' then
  local order = redis.call('INCR', KEY.submitted)
  redis.call('HSET', KEY.job .. id, 'order', order)
  await_doorbell(id, row, order)
else
  -- Nobody knows when its message was pushed, so it says nothing about the messages behind it: order stays 0.
  redis.call('HSET', KEY.job .. id, 'alarm', moment(now + CONFIG.grace_s))
  schedule(id, now + CONFIG.grace_s, tonumber(row.deadline))
end
count(origin == 'client' and 'submitted' or 'adopted')
return {'created'}

-- One heartbeat of a worker: it is alive, and the jobs that it still holds stay its own for another lease.
local worker, model, serves = ARGV[1], ARGV[2], ARGV[3]
local lease_ends = moment(now + CONFIG.lease_s)
go_on_when_full()
local seconds = watch()
for _, silent in ipairs(redis.call('ZRANGEBYSCORE', KEY.workers .. model, '-inf', stamp)) do
  redis.call('HDEL', KEY.serves .. model, silent)
end
redis.call('ZREMRANGEBYSCORE', KEY.workers .. model, '-inf', stamp)
redis.call('ZADD', KEY.workers .. model, lease_ends, worker)
redis.call('PEXPIRE', KEY.workers .. model, math.ceil(CONFIG.lease_s * 1000))
redis.call('ZADD', KEY.serving, lease_ends, model)
note_known(model)
if serves ~= '' then
  redis.call('HSET', KEY.serves .. model, worker, serves)
  redis.call('PEXPIRE', KEY.serves .. model, math.ceil(CONFIG.lease_s * 1000))
end
-- Who counts other leases than others do takes their jobs too early: `visionq doctor` looks for more than one.
local lease = string.format('%.9g', CONFIG.lease_s)
redis.call('ZREMRANGEBYSCORE', KEY.leases, '-inf', stamp)
redis.call('ZADD', KEY.leases, lease_ends, lease)
redis.call('PEXPIRE', KEY.leases, math.ceil(CONFIG.lease_s * 1000))

local holds = {}
for i = 4, #ARGV, 2 do
  local id, fence = ARGV[i], ARGV[i + 1]
  local status, owner, cancel = unpack(redis.call('HMGET', KEY.job .. id, 'status', 'fence', 'cancel'))
  if status == 'in_progress' and owner == fence then
    redis.call('HSET', KEY.job .. id, 'lease', moment(seconds + CONFIG.lease_s))
    redis.call('ZADD', KEY.due, lease_ends, id)
    holds[#holds + 1] = cancel and 'cancel' or 'held'
  else
    holds[#holds + 1] = 'lost'
  end
end
for step in pairs(STEP) do
  release(model .. ':' .. step) -- a new worker widens the window
end
mark_lists_for_sweep(model)
return holds

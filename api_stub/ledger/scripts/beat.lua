-- One heartbeat of a worker: it is alive, and the jobs that it still holds stay its own for another lease.
local worker, model = ARGV[1], ARGV[2]
-- Comes first: see `final` about full memory. A worker must not lose its jobs because Redis is full.
redis.call('ZREMRANGEBYSCORE', KEY.workers .. model, '-inf', stamp)
redis.call('ZADD', KEY.workers .. model, moment(now + CONFIG.lease_s), worker)
redis.call('PEXPIRE', KEY.workers .. model, math.ceil(CONFIG.lease_s * 1000))

local holds = {}
for i = 3, #ARGV, 2 do
  local id, fence = ARGV[i], ARGV[i + 1]
  local row = read(id, 'status', 'fence', 'cancel')
  if row.status == 'in_progress' and row.fence == fence then
    redis.call('ZADD', KEY.due, moment(now + CONFIG.lease_s), id)
    holds[#holds + 1] = row.cancel and 'cancel' or 'held'
  else
    holds[#holds + 1] = 'lost'
  end
end
return holds

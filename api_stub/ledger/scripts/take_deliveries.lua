-- Takes deliveries that are due, each for one lease: nobody else tries them meanwhile. Answers their fields, one list each.
local limit, lease_s = unpack(ARGV)
local reply = {}
for _, delivery in ipairs(redis.call('ZRANGEBYSCORE', KEY.deliveries, '-inf', stamp, 'LIMIT', 0, limit)) do
  local key = KEY.delivery .. delivery
  local job_id, kind, url, tenant, event = unpack(redis.call('HMGET', key, 'job_id', 'type', 'url', 'tenant', 'event'))
  if not job_id then
    redis.call('ZREM', KEY.deliveries, delivery)
  else
    local tries = redis.call('HINCRBY', key, 'tries', 1)
    redis.call('ZADD', KEY.deliveries, moment(now + tonumber(lease_s)), delivery)
    local is_gone = redis.call('EXISTS', KEY.gone .. redis.sha1hex(tenant .. ' ' .. url))
    reply[#reply + 1] = {delivery, job_id, kind, url, tenant, event, tries, is_gone}
  end
end
return reply

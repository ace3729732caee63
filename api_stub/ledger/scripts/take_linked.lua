-- Takes jobs that are over and have links, each for one lease: nobody else sends them meanwhile. Answers id, links and final event.
local limit, lease_s = unpack(ARGV)
local reply = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEY.linked, '-inf', stamp, 'LIMIT', 0, limit)) do
  local row = read(id, 'links', 'final')
  if not row.links then
    redis.call('ZREM', KEY.linked, id)
  elseif not row.final then
    look_at_links(id)
  else
    redis.call('ZADD', KEY.linked, moment(now + tonumber(lease_s)), id)
    reply[#reply + 1] = {id, row.links, row.final}
  end
end
return reply

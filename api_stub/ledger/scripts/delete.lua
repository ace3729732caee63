-- Takes everything about a final job away: row, events, result, and the delivery of its end to its webhook, which is a copy of them.
-- Answers its status, or nothing for an unknown job. One that is not final, or whose links are still to be sent, stays as it is.
local id = unpack(ARGV)
local row = read(id, 'status', 'final', 'tenant', 'links')
if not row.status then
  return ''
elseif row.final and row.links then
  return 'linked'
elseif row.final then
  local seq, ts = string.match(row.final, '"seq":(%d+),"attempt":%d+,"ts":([%d.]+)')
  local delivery = delivery_of(id, seq, ts)
  redis.call('ZREM', KEY.deliveries, delivery)
  redis.call('LREM', KEY.dead, 0, id)
  redis.call('ZREM', KEY.jobs .. row.tenant, id)
  redis.call('DEL', KEY.job .. id, KEY.events .. id, KEY.result .. id, KEY.delivery .. delivery)
  count('deleted')
end
return row.status

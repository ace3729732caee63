-- Writes down how one try of a delivery went, unless its lease has ended and it was taken again meanwhile.
local MAX_GIVEN_UP = 1000
local GONE_S = 86400
local delivery, tries, outcome, delay_s, reason = unpack(ARGV)
local key = KEY.delivery .. delivery
local row = {}
row.tries, row.job_id, row.kind, row.url, row.tenant = unpack(redis.call('HMGET', key, 'tries', 'job_id', 'type', 'url', 'tenant'))
if row.tries ~= tries then
  return 0
end
go_on_when_full()
if outcome == 'later' or outcome == 'again' then
  if outcome == 'later' then
    redis.call('HINCRBY', key, 'tries', -1) -- it was not tried
  end
  redis.call('ZADD', KEY.deliveries, moment(now + tonumber(delay_s)), delivery)
  redis.call('EXPIRE', key, math.ceil(tonumber(delay_s)) + DELIVERY_TTL_S)
  return 1
end

redis.call('ZREM', KEY.deliveries, delivery)
redis.call('DEL', key)
if outcome == 'gone' then
  redis.call('SET', KEY.gone .. redis.sha1hex(row.tenant .. ' ' .. row.url), 1, 'EX', GONE_S)
end
if outcome ~= 'delivered' then
  redis.call('LPUSH', KEY.given_up, '{"delivery":' .. quote(delivery) .. ',"job_id":' .. quote(row.job_id) .. ',"type":'
    .. quote(row.kind) .. ',"tries":' .. tries .. ',"reason":' .. quote(reason) .. ',"ts":' .. stamp .. '}')
  redis.call('LTRIM', KEY.given_up, 0, MAX_GIVEN_UP - 1)
end
count('webhook_' .. outcome)
return 1

-- Take a kept job off whose time is over. 0: it was on it; -1: it was not; else the milliseconds that it is still kept.
local left_until = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not left_until then
  return -1
end
local time = redis.call('TIME')
local left_ms = left_until - (time[1] * 1000 + math.floor(time[2] / 1000))
if left_ms > 0 then
  return left_ms
end
redis.call('ZREM', KEYS[1], ARGV[1])
return 0

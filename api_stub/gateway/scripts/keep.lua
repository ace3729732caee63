-- Keep a job that nobody waits for any more until `expires_ms` from now. 0: the caller keeps `max` already.
-- Entries are `<what was asked> <job id>`, by the time until which they are handed out, in milliseconds.
local member, keep_ms, max, linger_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- Whose process died before it took them off; a living one does so long before.
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - linger_ms)
if redis.call('ZCOUNT', KEYS[1], now, '+inf') >= max then
  return 0
end
redis.call('ZADD', KEYS[1], now + keep_ms, member)
redis.call('PEXPIRE', KEYS[1], keep_ms + linger_ms)
return 1

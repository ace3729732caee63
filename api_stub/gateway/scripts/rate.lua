-- Generic cell rate algorithm (ITU-T I.371): one time per caller, the moment at which its allowance is whole again.
-- ARGV: requests per minute. Answers 0, or the milliseconds to wait.
local per_minute = tonumber(ARGV[1])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + tonumber(clock[2]) / 1000
local step, burst = 60000 / per_minute, 60000
local whole = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), now) + step
if whole - now > burst + 0.5 then
  return math.ceil(whole - now - burst)
end
redis.call('SET', KEYS[1], string.format('%.3f', whole), 'PX', math.ceil(whole - now) + 1000)
return 0

-- Hand the oldest job that is kept for the same question to its repetition, once; empty: there is none.
local asked = ARGV[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], now, '+inf')) do
  if string.sub(member, 1, #asked + 1) == asked .. ' ' then
    redis.call('ZREM', KEYS[1], member)
    return string.sub(member, #asked + 2)
  end
end
return ''

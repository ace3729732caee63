-- Lends the batch that waited longest to one runner. KEYS: ZSET batch id -> Redis time at which it may be taken.
-- ARGV: lease in seconds, prefix of the batches' hashes. Answers id and fence, or nothing.
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, 10)) do
  if redis.call('EXISTS', ARGV[2] .. id) == 1 then
    redis.call('ZADD', KEYS[1], string.format('%.3f', now + tonumber(ARGV[1])), id)
    return {id, redis.call('HINCRBY', ARGV[2] .. id, 'fence', 1)}
  end
  redis.call('ZREM', KEYS[1], id)
end
return {}

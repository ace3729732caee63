-- Counts a mistake of ours at a batch, and lets the batch wait. KEYS: as in batch_keep. ARGV: id, fence, seconds to wait after the
-- first mistake, twice as long after each one more. Whoever writes down progress sets the count back.
-- Answers how many there were in a row, or 0 when somebody else has the batch.
local id, fence, pause = unpack(ARGV)
if redis.call('HGET', KEYS[2], 'fence') ~= fence or not redis.call('ZSCORE', KEYS[1], id) then
  return 0
end
local clock = redis.call('TIME')
local mistakes = redis.call('HINCRBY', KEYS[2], 'mistakes', 1)
local at = tonumber(clock[1]) + tonumber(clock[2]) / 1e6 + tonumber(pause) * 2 ^ (mistakes - 1)
redis.call('ZADD', KEYS[1], string.format('%.3f', at), id)
return mistakes

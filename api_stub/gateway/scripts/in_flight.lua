-- Makes room for one more unfinished job of a caller. ARGV: job id, limit, prefix of the ledger's rows, status words that are final.
-- Answers 1, or 0 when the caller has as many as it may have.
local id, limit, prefix = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local now = tonumber(redis.call('TIME')[1])
local RESERVED_S = 60 -- a job that is not in the ledger by then never came

local final = {}
for i = 4, #ARGV do
  final[ARGV[i]] = true
end

if redis.call('ZSCORE', KEYS[1], id) then
  return 1
end
if redis.call('ZCARD', KEYS[1]) >= limit then
  for _, held in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    local status = redis.call('HGET', prefix .. held, 'status')
    local is_over = status and final[status]
    local never_came = not status and tonumber(redis.call('ZSCORE', KEYS[1], held)) + RESERVED_S < now
    if is_over or never_came then
      redis.call('ZREM', KEYS[1], held)
    end
  end
  if redis.call('ZCARD', KEYS[1]) >= limit then
    return 0
  end
end
redis.call('ZADD', KEYS[1], now, id)
redis.call('EXPIRE', KEYS[1], 8 * 86400)
return 1

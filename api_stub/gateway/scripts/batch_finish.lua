-- Ends a batch. KEYS: as in batch_keep, then ZSET of the tenant's files. ARGV: id, fence, final status, seconds to keep it, prefix
-- of the files' records, seconds to keep those, number of new files, file id and record for each, then fields and values.
-- Answers 0 when somebody else has the batch.
local id, fence, status, keep, prefix, keep_files, num_files = unpack(ARGV)
if redis.call('HGET', KEYS[2], 'fence') ~= fence or not redis.call('ZSCORE', KEYS[1], id) then
  return 0
end
local clock = redis.call('TIME')
local last = 7 + 2 * tonumber(num_files)
for i = 8, last, 2 do
  redis.call('SET', prefix .. ARGV[i], ARGV[i + 1], 'EX', keep_files)
  redis.call('ZADD', KEYS[3], clock[1], ARGV[i])
  redis.call('EXPIRE', KEYS[3], keep_files)
end
for i = last + 1, #ARGV, 2 do
  redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
end
redis.call('HSET', KEYS[2], 'status', status, status .. '_at', clock[1])
redis.call('EXPIRE', KEYS[2], keep)
redis.call('ZREM', KEYS[1], id)
return 1

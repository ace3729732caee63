-- Writes down how far a runner is, and lengthens its lease. KEYS: as in batch_take, the batch's hash.
-- ARGV: id, fence, lease in seconds (0: give it back), status word (empty: as it is), then fields and values.
-- A batch that is being cancelled stays so. Answers the status, or an empty string when somebody else has the batch.
local id, fence, lease, status = unpack(ARGV)
if redis.call('HGET', KEYS[2], 'fence') ~= fence or not redis.call('ZSCORE', KEYS[1], id) then
  return ''
end
local clock = redis.call('TIME')
redis.call('ZADD', KEYS[1], string.format('%.3f', tonumber(clock[1]) + tonumber(clock[2]) / 1e6 + tonumber(lease)), id)
for i = 5, #ARGV, 2 do
  redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
end
local known = redis.call('HGET', KEYS[2], 'status')
if status ~= '' and status ~= known and known ~= 'cancelling' then
  redis.call('HSET', KEYS[2], 'status', status, status .. '_at', clock[1])
  known = status
end
return known

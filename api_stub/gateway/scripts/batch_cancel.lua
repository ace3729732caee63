-- Asks for a batch's end. KEYS: the batch's hash. Answers the status before.
local known = redis.call('HGET', KEYS[1], 'status') or ''
if known == 'validating' or known == 'in_progress' or known == 'finalizing' then
  redis.call('HSET', KEYS[1], 'status', 'cancelling', 'cancelling_at', redis.call('TIME')[1])
end
return known

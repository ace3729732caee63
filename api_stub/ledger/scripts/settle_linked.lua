-- The links of a job are sent. The tasks behind it in its chain, if it failed, fail with it: `outcome` is its failure, then their ids.
local id, outcome = ARGV[1], ARGV[2]
redis.call('ZREM', KEY.linked, id)
redis.call('HDEL', KEY.job .. id, 'links')
for i = 3, #ARGV do
  if redis.call('EXISTS', KEY.job .. ARGV[i]) == 0 then
    write_result(ARGV[i], CELERY_STATE.failed, outcome, true)
  end
end
return 1

-- A worker stops serving its model.
local worker, model = unpack(ARGV)
redis.call('ZREM', KEY.workers .. model, worker)
return 1

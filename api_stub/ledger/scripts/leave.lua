-- A worker stops serving its model.
local worker, model = unpack(ARGV)
redis.call('ZREM', KEY.workers .. model, worker)
redis.call('HDEL', KEY.serves .. model, worker)
return 1

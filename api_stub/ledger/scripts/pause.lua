-- Pauses a model's queue, or lets it go on: those at the heads of its lines then have their doorbells at once. Answers whether this
-- changed anything, how many jobs the model has, and how many workers.
local model, wanted = unpack(ARGV)
local is_changed = (is_paused(model) and '1' or '0') ~= wanted
go_on_when_full()
if is_changed and wanted == '1' then
  redis.call('HSET', KEY.paused, model, stamp)
elseif is_changed then
  redis.call('HDEL', KEY.paused, model)
  note_known(model) -- its jobs wait for a worker from now on
  for step in pairs(STEP) do
    release(model .. ':' .. step)
  end
  mark_lists_for_sweep(model)
end
local depth = tonumber(redis.call('GET', KEY.depth .. model) or '0')
return {is_changed and 1 or 0, depth, redis.call('ZCOUNT', KEY.workers .. model, '(' .. stamp, '+inf')}

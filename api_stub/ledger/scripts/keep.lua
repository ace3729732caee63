-- The attempt has committed a checkpoint: the job goes on from `step`, whoever runs it. What was lost before counts no more, nor does
-- the loss of this attempt. Asked again for the same step, or an earlier one, nothing changes.
-- Then the oldest of the stream's progress goes, but for the newest events of it: every other event stays.
local id, fence, step = unpack(ARGV)
local row = read(id, 'status', 'fence', 'worker', 'attempt', 'kept')
if row.status ~= 'in_progress' or row.fence ~= fence then
  return 0
end
go_on_when_full()
if tonumber(step) > tonumber(row.kept or '0') then
  redis.call('HSET', KEY.job .. id, 'kept', step, 'kept_by', row.attempt, 'losses', 0, 'retries', 0)
  redis.call('SREM', KEY.suspects .. row.worker, id)
end

local progress = {}
for _, entry in ipairs(redis.call('XRANGE', KEY.events .. id, '-', '+')) do
  if string.find(entry[2][2], TRAINING.progress, 1, true) then
    progress[#progress + 1] = entry[1]
  end
end
for i = 1, #progress - TRAINING.kept_events do
  redis.pcall('XDEL', KEY.events .. id, progress[i]) -- refused to a user of Redis from before fine-tuning: the stream is longer then
end
return 1

-- in_progress -> queued by the worker that holds the job. Costs the job none of its attempts, and one of its retries when it is
-- charged. A job that was asked to stop ends here.
local id, fence, reason, delay_s, is_charged = unpack(ARGV)
local row = read(id, 'status', 'fence', 'model', 'list', 'tenant', 'worker', 'attempt', 'started_seq', 'deadline', 'cancel')
if row.status ~= 'in_progress' or row.fence ~= fence then
  return 0
end
go_on_when_full()
if row.cancel then
  unanswered(id, row, 'cancelled', 'cancelled', 'cancelled while it was running')
else
  if is_charged == '1' then
    redis.call('HINCRBY', KEY.job .. id, 'retries', 1)
  end
  requeue(id, row, reason, tonumber(delay_s))
  make_room(row)
  count('given_back')
end
return 1

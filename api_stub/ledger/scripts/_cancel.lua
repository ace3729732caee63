-- A queued job ends at once; a running one is flagged and its worker notified, by channel now and by its next beat.
-- `row` needs: status model list tenant worker attempt started_seq.
local function cancel(id, row)
  if not row.status then
    return 'unknown'
  elseif row.status == 'queued' then
    unanswered(id, row, 'cancelled', 'cancelled', 'cancelled while it was queued')
    return 'cancelled'
  elseif row.status == 'in_progress' then
    go_on_when_full()
    redis.call('HSET', KEY.job .. id, 'cancel', 1)
    redis.call('PUBLISH', KEY.cancel, id)
    return 'cancelling'
  end
  return 'final'
end

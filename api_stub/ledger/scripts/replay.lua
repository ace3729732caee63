-- One consistent read of a job's ending and of its events from entry `first` on (none: only the ending), at most `limit` (none: all).
local id, first, limit = unpack(ARGV)
local row = read(id, 'status', 'final')
local reply = {row.status or '', row.final or ''}
if first ~= '' then
  local range = {KEY.events .. id, first, '+'}
  if limit ~= '' then
    range = {KEY.events .. id, first, '+', 'COUNT', limit}
  end
  local entries = redis.call('XRANGE', unpack(range))
  local is_begun = entries[1] and entries[1][1] == '1-0'
  if first == '1-0' and row.status and not is_begun and (entries[1] or not row.final) then
    reply[3] = queued_event(id)
  end
  for _, entry in ipairs(entries) do
    reply[#reply + 1] = entry[2][2]
  end
end
return reply

-- One consistent read of a job's ending and of its events from entry `first` on (none: only the ending).
local id, first = unpack(ARGV)
local row = read(id, 'status', 'final')
local reply = {row.status or '', row.final or ''}
if first ~= '' then
  for _, entry in ipairs(redis.call('XRANGE', KEY.events .. id, first, '+')) do
    reply[#reply + 1] = entry[2][2]
  end
end
return reply

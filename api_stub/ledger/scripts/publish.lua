-- All events of one engine step, for all its jobs. ARGV: job id, fence, number, body of the event, repeated.
local replies = {}
for i = 1, #ARGV, 4 do
  local id, fence, number, fragment = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local row = read(id, 'status', 'fence', 'number', 'seq', 'attempt')
  if row.status ~= 'in_progress' or row.fence ~= fence then
    replies[#replies + 1] = 0
  else
    if tonumber(number) > tonumber(row.number) then
      local seq = tonumber(row.seq) + 1
      redis.call('HSET', KEY.job .. id, 'seq', seq, 'number', number)
      write_event(id, seq, row.attempt, fragment)
    end
    replies[#replies + 1] = 1
  end
end
return replies

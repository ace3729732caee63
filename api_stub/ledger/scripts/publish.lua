-- All events of one engine step, for all its jobs. ARGV: job id, fence, number, body of the event, repeated.
local replies = {}
for i = 1, #ARGV, 4 do
  local id, fence, number, fragment = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local row = redis.call('HMGET', KEY.job .. id, 'status', 'fence', 'number', 'seq', 'attempt')
  local status, owner, last_number, last_seq, attempt = unpack(row)
  if status ~= 'in_progress' or owner ~= fence then
    replies[#replies + 1] = 0
  else
    if tonumber(number) > tonumber(last_number) then
      local seq = tonumber(last_seq) + 1
      redis.call('HSET', KEY.job .. id, 'seq', seq, 'number', number)
      local is_written, problem = pcall(write_event, id, seq, attempt, fragment)
      if not is_written then
        redis.call('HSET', KEY.job .. id, 'seq', last_seq, 'number', last_number) -- sent again it fails again, and does not pass for written
        error(problem, 0)
      end
    end
    replies[#replies + 1] = 1
  end
end
return replies

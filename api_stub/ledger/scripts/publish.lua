-- All events of one engine step, for all its jobs. ARGV: job id, fence, number, body of the event, repeated.

-- A training's stream keeps the newest of its progress, and all that is no progress.
local function forget_oldest_progress(id)
  local key = KEY.job .. id
  local num, after = redis.call('HINCRBY', key, 'num_progress', 1), redis.call('HGET', key, 'trimmed')
  while num > TRAINING.kept_events do
    local entries = redis.call('XRANGE', KEY.events .. id, after and '(' .. after or '-', '+', 'COUNT', 16)
    for _, entry in ipairs(entries) do
      after = entry[1]
      if num > TRAINING.kept_events and string.find(entry[2][2], TRAINING.progress, 1, true) then
        local removed = redis.pcall('XDEL', KEY.events .. id, after)
        if type(removed) == 'table' then
          return -- refused: a user of Redis from before fine-tuning may not; the stream is longer then
        end
        redis.call('HSET', key, 'trimmed', after)
        num = redis.call('HINCRBY', key, 'num_progress', -1)
      end
    end
    if #entries == 0 then
      return redis.call('HSET', key, 'num_progress', 0) -- somebody else took them out
    end
  end
end

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
      if string.find(fragment, TRAINING.progress, 1, true) == 1 then
        forget_oldest_progress(id)
      end
    end
    replies[#replies + 1] = 1
  end
end
return replies

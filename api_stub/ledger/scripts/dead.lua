-- The jobs that were given up because their workers kept dying, newest first. Ids whose rows have expired are left out.
local reply = {}
for _, id in ipairs(redis.call('LRANGE', KEY.dead, 0, tonumber(ARGV[1]) - 1)) do
  reply[#reply + 1] = view(id) or nil
end
return reply

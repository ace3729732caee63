-- The model names that workers serve or did in the last day; also the one that is asked for (may be empty), if it is one.
local asked = ARGV[1]
local found = redis.call('ZRANGEBYSCORE', KEY.known, '(' .. moment(now - KNOWN_S), '+inf')
if asked ~= '' and is_served(asked) then
  found[#found + 1] = asked
end
return found

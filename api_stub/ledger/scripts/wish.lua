-- Replaces what operators want of a model's workers, unless somebody else was faster.
local model, former, new = unpack(ARGV)
local key = KEY.wanted .. model
if (redis.call('GET', key) or '') ~= former then
  return 0
end
redis.call('SET', key, new)
return 1

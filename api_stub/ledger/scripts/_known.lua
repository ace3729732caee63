-- Model names that a worker serves or did in the last day, and how long a job waits for a worker of its model to appear.
local KNOWN_S = 86400

local function is_served(model)
  return redis.call('EXISTS', KEY.workers .. model) == 1
end

-- Workers of 0.1.0 are known by their presence alone.
local function is_known(model)
  local served = redis.call('ZSCORE', KEY.known, model)
  return served and now - tonumber(served) < KNOWN_S or is_served(model)
end

local function note_known(model)
  redis.call('ZADD', KEY.known, stamp, model)
end

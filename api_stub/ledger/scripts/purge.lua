-- Ends the queued jobs of one model that were there at the first call, some at a time. Answers what the next call is given as `first`
-- and `cursor` (none after the last call), and how many jobs this one ended.
--
-- A queued job waits for its doorbell, is held, or waits for its alarm, and may go from one to the other between two calls. Those with
-- an alarm are in the reapers' agenda alone, among all others'. ZSCAN finds every member that stays there from its first call to its
-- last, and goes on only in a call that has found nobody waiting and nobody held. So whoever it misses was claimed meanwhile.
local MAX_ENDED = 20
local MAX_LOOKS = 100
local model, first, cursor = unpack(ARGV)
first = first ~= '' and first or (redis.call('GET', KEY.submitted) or '0') .. ' ' .. stamp
local last, since = string.match(first, '^(%d+) ([%d.]+)$')
local num_ended = 0

-- By its time, or by its number, which a job without a tenant that was never rung for has in its line alone.
local function was_there(id, row)
  local number = row.place or row.order or redis.call('ZSCORE', line_of(row.list, row.tenant), id) or '1e300'
  return tonumber(row.created) <= tonumber(since) or tonumber(number) <= tonumber(last)
end

local function end_queued(id)
  local row = read(id, 'status', 'model', 'list', 'tenant', 'worker', 'attempt', 'started_seq', 'created', 'place', 'order')
  if row.status == 'queued' and row.model == model and was_there(id, row) then
    unanswered(id, row, 'cancelled', 'cancelled', 'cancelled while it was queued: its queue was purged')
    num_ended = num_ended + 1
  end
  return row.status
end

local function end_held(list, tenant)
  local line = line_of(list, tenant)
  for _, id in ipairs(redis.call('ZRANGE', line, '-inf', last, 'BYSCORE', 'LIMIT', 0, MAX_ENDED - num_ended)) do
    if not end_queued(id) then
      leave_line(id, {list = list, tenant = tenant})
      forget(id, model)
    end
  end
end

-- Held ones first, tenants whose turn comes before those at their cap: else each end would ring for the next one in vain.
local function end_list(list)
  for first = 0, redis.call('ZCARD', KEY.turns .. list) - 1, MAX_LOOKS do
    for _, tenant in ipairs(redis.call('ZRANGE', KEY.turns .. list, first, first + MAX_LOOKS - 1)) do
      end_held(list, tenant)
    end
    if num_ended > 0 then
      return
    end
  end
  for _, tenant in ipairs(redis.call('HKEYS', KEY.tenants .. model)) do
    end_held(list, tenant)
  end
  for _, id in ipairs(num_ended == 0 and redis.call('ZRANGE', KEY.waiting .. list, 0, -1) or {}) do
    if num_ended < MAX_ENDED then
      end_queued(id)
    end
  end
end

go_on_when_full()
for step in pairs(STEP) do
  end_list(model .. ':' .. step)
  if num_ended > 0 then
    return {first, cursor ~= '' and cursor or '0', num_ended}
  end
end
local page = redis.call('ZSCAN', KEY.due, cursor ~= '' and cursor or '0', 'COUNT', MAX_LOOKS)
for i = 1, #page[2], 2 do
  end_queued(page[2][i])
end
return {first, page[1] == '0' and '' or page[1], num_ended}

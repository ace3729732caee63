-- A tenant's jobs, newest first, from `cursor` on. Answers the next page's cursor (none after the last), then the jobs.
local MAX_LOOKS = 1000
local tenant, status, model, cursor, limit = unpack(ARGV)
limit = tonumber(limit)

local function is_wanted(id)
  local row = read(id, 'status', 'model')
  return row.status and (status == '' or row.status == status) and (model == '' or row.model == model)
end

local last = cursor == '' and '+inf' or '(' .. cursor
local entries = redis.call('ZREVRANGEBYSCORE', KEY.jobs .. tenant, last, '-inf', 'WITHSCORES', 'LIMIT', 0, MAX_LOOKS)
local reply = {''}
for i = 1, #entries, 2 do
  if is_wanted(entries[i]) then
    reply[#reply + 1] = view(entries[i])
  end
  if #reply > limit or i + 1 == 2 * MAX_LOOKS then
    local is_last = redis.call('ZCOUNT', KEY.jobs .. tenant, '-inf', '(' .. entries[i + 1]) == 0
    reply[1] = is_last and '' or entries[i + 1]
    break
  end
end
return reply

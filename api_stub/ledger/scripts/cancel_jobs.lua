-- Asks for the end of a tenant's jobs, some at a time, newest first: of those with this status, this model and these members of their
-- metadata, as far as they are given. Answers the cursor of the next call (none after the last), how many were queued and have ended,
-- and how many run and were asked to stop. A job that comes after the first call is above its cursor.
local MAX_LOOKS = 200
local MAX_CANCELS = 20
local MAX_BYTES = 100000 -- of bodies, which are read for their metadata
local tenant, status, model, metadata, cursor = unpack(ARGV)
local wanted = metadata ~= '' and cjson.decode(metadata)
local num_bytes = 0

local function has_metadata(id)
  local body = redis.call('HGET', KEY.job .. id, 'body') or ''
  num_bytes = num_bytes + #body
  local is_json, job = pcall(cjson.decode, body)
  local found = is_json and type(job) == 'table' and job.metadata
  for name, value in pairs(wanted) do
    if type(found) ~= 'table' or found[name] ~= value then
      return false
    end
  end
  return true
end

local function is_wanted(id, row)
  return (row.status == 'queued' or row.status == 'in_progress') and row.tenant == tenant
    and (status == '' or row.status == status) and (model == '' or row.model == model) and (not wanted or has_metadata(id))
end

local num = {cancelled = 0, cancelling = 0}
local last = cursor == '' and '+inf' or '(' .. cursor
local entries = redis.call('ZREVRANGEBYSCORE', KEY.jobs .. tenant, last, '-inf', 'WITHSCORES', 'LIMIT', 0, MAX_LOOKS)
for i = 1, #entries, 2 do
  local id = entries[i]
  local row = read(id, 'status', 'model', 'list', 'tenant', 'worker', 'attempt', 'started_seq')
  if is_wanted(id, row) then
    local answer = cancel(id, row)
    num[answer] = num[answer] + 1
  end
  if num.cancelled + num.cancelling >= MAX_CANCELS or num_bytes >= MAX_BYTES or i + 1 == 2 * MAX_LOOKS then
    return {entries[i + 1], num.cancelled, num.cancelling}
  end
end
return {'', num.cancelled, num.cancelling}

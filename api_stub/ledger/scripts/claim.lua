-- queued -> in_progress for one worker. `token` names this call: asked again with it, the same claim is answered again.
local id, worker, token, checkpoint = unpack(ARGV)
local row = read(id, 'status', 'task', 'model', 'list', 'body', 'created', 'queued_at', 'deadline', 'attempt', 'fence', 'token',
  'started', 'started_seq', 'order', 'not_before', 'tenant', 'losses', 'retries', 'place', 'adapter', 'v')

local function claimed()
  return {'claimed', row.task, row.model, row.body, row.attempt, row.fence,
    row.deadline and moment(tonumber(row.deadline) - now) or '',
    moment(tonumber(row.started) - tonumber(row.queued_at)),
    moment(tonumber(row.started) - tonumber(row.created)), row.retries}
end

if not row.status then
  return {'unknown'}
elseif row.status == 'in_progress' then
  return row.token == token and claimed() or {'busy'}
elseif row.status ~= 'queued' then
  return {(row.status == 'cancelled' or row.status == 'expired') and row.status or 'final'}
elseif row.deadline and now >= tonumber(row.deadline) then
  expire(id, row)
  return {'expired'}
elseif row.not_before and now < tonumber(row.not_before) then
  return {'busy'}
elseif must_run_elsewhere(id, row, worker) then
  stop_waiting(id, row)
  leave_line(id, row)
  postpone(id, row, CONFIG.lease_s / 15)
  return {'apart'}
end

-- Greater than every earlier one, and never the same again: a Redis that forgot its last writes counts some numbers twice, but the
-- token's digits (40 bits of it) are this call's own. Before any removal: a full Redis refuses here or not at all.
local digits = tonumber(string.sub(redis.sha1hex(token), 1, 10), 16)
row.fence = string.format('%.0f%013.0f', redis.call('INCR', KEY.fence), digits)
stop_waiting(id, row)
if is_paused(row.model) or is_capped(row.model, row.tenant) then
  hold(id, row)
  return {'held'}
end
leave_line(id, row)

row.attempt = tonumber(row.attempt) + 1
row.started = stamp
local function weights()
  if not may_tell_checkpoint(row) then
    return ''
  end
  local asked = row.adapter and ',"adapter":' .. quote(row.adapter) or ''
  local digest = checkpoint
  for i = 5, row.adapter and #ARGV or 0, 2 do
    digest = ARGV[i] == row.adapter and checkpoint .. '+' .. ARGV[i + 1] or digest
  end
  local is_unserved = row.adapter and digest == checkpoint
  return (digest ~= '' and not is_unserved and ',"checkpoint":' .. quote(digest) or '') .. asked
end
local _, seq = emit(id, row.attempt,
  '"type":"job.started","worker":' .. quote(worker) .. ',"model":' .. quote(row.model) .. weights())
redis.call('HSET', KEY.job .. id, 'status', 'in_progress', 'attempt', row.attempt, 'fence', row.fence, 'worker', worker,
  'token', token, 'lease', moment(watched() + CONFIG.lease_s), 'number', 0, 'started', stamp, 'started_seq', seq)
redis.call('HDEL', KEY.job .. id, 'alarm', 'not_before')
begin_running(id, row, worker)
redis.call('ZADD', KEY.due, moment(now + CONFIG.lease_s), id)
-- Doorbells of one list arrive in order: whoever was submitted before this job and still waits has lost its own.
if tonumber(row.order or '0') > tonumber(redis.call('GET', KEY.watermark .. row.list) or '0') then
  redis.call('SET', KEY.watermark .. row.list, row.order)
  mark_for_sweep(row.list)
end
count('claimed')
make_room(row)
row.attempt = tostring(row.attempt)
return claimed()

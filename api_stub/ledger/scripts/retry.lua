-- A new job with the body of a finished one. Asked again, the same new job, unless that was deleted: its id is kept with the finished
-- one.
local id, new_id = unpack(ARGV)
local row = read(id, 'status', 'final', 'digest', 'body', 'task', 'model', 'priority', 'tenant', 'created', 'deadline', 'retried_as',
  'hook_url', 'hook_events', 'adapter')
if not row.status then
  return {'unknown'}
elseif not row.final then
  return {'unfinished', row.status}
elseif row.body == '' then
  return {'invalid'}
elseif row.retried_as and redis.call('EXISTS', KEY.job .. row.retried_as) == 1 then
  return {'same', row.retried_as}
end
local is_refused, depth = is_full(row.model)
if is_refused then
  return {'full', row.model, CONFIG.max_queued, depth}
end

local list = row.model .. ':' .. step_of(row.priority)
local new = create(new_id, {digest = row.digest, body = row.body, task = row.task, model = row.model, priority = row.priority,
  list = list, tenant = row.tenant, deadline_s = row.deadline and moment(tonumber(row.deadline) - tonumber(row.created)) or '',
  hook_url = row.hook_url, hook_events = row.hook_events, adapter = row.adapter})
redis.call('HSET', KEY.job .. id, 'retried_as', new_id)
redis.call('LREM', KEY.dead, 1, id)
count('retried')
hold(new_id, new)
release(list)
return {'created', new_id}

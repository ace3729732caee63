-- Shared by every transition: the clock, the row and its events.
-- KEY, CONFIG and the contract's tables are put in front of this file.
--
-- Row (HASH, all strings; absent means none): status task model priority list tenant body digest created queued_at deadline seq
-- attempt losses retries fence worker token lease number cancel started started_seq place order bell alarm not_before finished
-- finished_by final retried_as hook_url hook_events links kept kept_by adapter v.
--   list     which priority list of which queue carries its doorbell
--   place    its place among the held jobs of its tenant; absent without a tenant, `order` counts then
--   order    number of its first doorbell; raises the list's watermark when the job is claimed (0: never, absent: not rung yet)
--   bell     number of its newest doorbell; 0 or absent when no message announces the job
--   losses   workers that were lost while they held it; retries: faults of the world that sent it back
--   alarm    when a reaper must ring, or look again for the doorbell
--   lease    until when its worker may be silent, on the clock of `watched`
--   kept     the newest step that training can go on from; kept_by: the attempt that made it
--   links    what a plain message's producer wants sent by Celery when the job is over, until it is sent
--   adapter  the one that the job asks for; v: 2 when a release that ignores unknown fields has written the row
--   hook_url, hook_events   where its webhook goes, and the types of event that it gets, each between commas

local quote = cjson.encode

local function moment(seconds)
  return string.format('%.6f', seconds)
end

local clock = redis.call('TIME')
local wall = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local last, ahead, older = unpack(redis.call('HMGET', KEY.watch, 'time', 'ahead', 'older'))

-- Processes of 0.1.0 on the same Redis do not record what their claims and submits mean for a list. They are known by what they do
-- not write: beside `at` its copy `mark`, beside `submitted` the share that is ours.
local OLDER_S = 600

local function note_older()
  older = moment(wall)
  redis.call('HSET', KEY.watch, 'older', older)
end

local function is_beside_older()
  return older and wall - tonumber(older) < OLDER_S
end

-- Readers of 0.1.0 refuse fields that they do not know, so neither their own jobs (rows without `v`) get any, nor others beside them.
local function may_tell_checkpoint(row)
  return row.v and not is_beside_older()
end

-- How far `now` is ahead of Redis' clock: `now` never goes back. It stands still when Redis' clock is set back, and what is due in a
-- minute stays so; then it goes slower, until both are the same again. Redis' clock set forward again takes off first what `now` is
-- ahead. Processes of 0.1.0 know Redis' clock alone: beside them `now` is that. `last` is what the last beat or sweep had.
local LEAP_S = 30
local SLOWER = 0.1

local function lead()
  if not last or is_beside_older() then
    return 0
  end
  ahead = tonumber(ahead or '0')
  local passed = wall + ahead - tonumber(last)
  return math.max(0, ahead - (passed < 0 and passed or passed > LEAP_S and passed or passed * SLOWER))
end

ahead = lead()
local now = wall + ahead
local stamp = moment(now)

local function read(id, ...)
  local row = {}
  local fields = {...}
  for i, value in ipairs(redis.call('HMGET', KEY.job .. id, ...)) do
    row[fields[i]] = value or nil
  end
  return row
end

-- Redis refuses the first write of a script when memory is full and lets a script that has written go on; removing nothing is a
-- write, too. For the steps that end jobs, which frees memory, or that keep running ones alive.
local function go_on_when_full()
  redis.call('HDEL', KEY.watch, '')
end

-- For how long Redis was seen to answer: the seconds between one beat or sweep of anybody and the next. Leases are measured in
-- them, because a worker that could not reach Redis is not lost. Of a gap in which nobody spoke only a part counts: most of a
-- lease is left to beat again, and jobs of dead workers are taken in the end however rarely somebody sweeps.
local function watched()
  local at, seconds = unpack(redis.call('HMGET', KEY.watch, 'at', 'seconds'))
  local gap = at and math.max(0, wall - tonumber(at)) or 0
  return tonumber(seconds or '0') + (gap > CONFIG.lease_s / 2 and CONFIG.lease_s / 4 or gap)
end

local function watch()
  local seconds = watched()
  local at, mark = unpack(redis.call('HMGET', KEY.watch, 'at', 'mark'))
  if at ~= mark then
    note_older()
  end
  local seen = moment(wall)
  redis.call('HSET', KEY.watch, 'at', seen, 'mark', seen, 'seconds', moment(seconds), 'time', stamp, 'ahead', moment(ahead))
  return seconds
end

local function next_number()
  redis.call('HINCRBY', KEY.watch, 'ours', 1)
  return redis.call('INCR', KEY.submitted)
end

local function count(what)
  redis.call('HINCRBY', KEY.counts, what, 1)
end

local function event_json(id, seq, attempt, ts, fragment)
  return '{"v":' .. EVENT.version .. ',"job_id":' .. quote(id) .. ',"seq":' .. seq .. ',"attempt":' .. attempt .. ',"ts":' .. ts
    .. ',' .. fragment .. '}'
end

-- The stream's entry ids are `<seq>-0`: a reader can ask for everything after a seq.
local function append(id, seq, event)
  redis.call('XADD', KEY.events .. id, seq .. '-0', 'event', event)
end

local function publish(id, event)
  redis.pcall('PUBLISH', KEY.events .. id, event) -- refused: readers find it in the stream, when the channel falls silent
end

local function write_event(id, seq, attempt, fragment)
  local event = event_json(id, seq, attempt, stamp, fragment)
  append(id, seq, event)
  publish(id, event)
  return event
end

-- A job's first event. A stream of it alone would cost a waiting job more than all the rest does, so it enters the stream in front of
-- the second; until then, readers answer it from the row.
local function queued_event(id)
  local created, model, priority = unpack(redis.call('HMGET', KEY.job .. id, 'created', 'model', 'priority'))
  local fragment = '"type":"job.queued","model":' .. quote(model) .. ',"priority":' .. priority
  return event_json(id, 1, 0, created, fragment), fragment
end

-- A worker looks when the job is over, and now and then before: a process of 0.1.0 ends jobs without a word about links.
local LINKS_LOOK_S = 30

local function look_at_links(id)
  redis.call('ZADD', KEY.linked, moment(now + LINKS_LOOK_S), id)
end

-- The delivery of an event to the job's webhook, if that wants the event: it exists from the same step on as the event itself.
-- The first `type` of a fragment is the event's: others stand only inside a completed job's result, behind it.
local DELIVERY_TTL_S = 7 * 86400

local function delivery_of(id, seq, ts)
  return 'msg_' .. redis.sha1hex(id .. ' ' .. seq .. ' ' .. ts)
end

local function enqueue_delivery(id, seq, event, fragment)
  local url, wanted, tenant = unpack(redis.call('HMGET', KEY.job .. id, 'hook_url', 'hook_events', 'tenant'))
  local kind = url and string.match(fragment, '"type":"([%w._]+)"')
  if kind and string.find(wanted, ',' .. kind .. ',', 1, true) then
    local delivery = delivery_of(id, seq, stamp)
    redis.call('HSET', KEY.delivery .. delivery, 'job_id', id, 'type', kind, 'url', url, 'tenant', tenant or '', 'event', event,
      'tries', 0)
    redis.call('EXPIRE', KEY.delivery .. delivery, DELIVERY_TTL_S)
    redis.call('ZADD', KEY.deliveries, stamp, delivery)
    redis.call('ZREMRANGEBYSCORE', KEY.deliveries, '-inf', moment(now - DELIVERY_TTL_S)) -- no gateway has run since
  end
end

local function emit(id, attempt, fragment)
  local seq = redis.call('HINCRBY', KEY.job .. id, 'seq', 1)
  if seq == 2 and redis.call('EXISTS', KEY.events .. id) == 0 then
    append(id, 1, (queued_event(id)))
  end
  local event = write_event(id, seq, attempt, fragment)
  enqueue_delivery(id, seq, event, fragment)
  return event, seq
end

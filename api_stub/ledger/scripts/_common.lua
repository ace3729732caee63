-- Shared by every transition: Redis' clock, the row, events, the doorbell's bookkeeping, and the one way in which a job ends.
-- KEY, CONFIG, CELERY_STATE, RETRYABLE, EVENT and FAILURE are put in front of this file.
--
-- Row (HASH, all strings; absent means none): status task model priority list tenant body digest created queued_at deadline seq
-- attempt losses fence worker token lease number cancel started started_seq order bell alarm not_before finished finished_by final.
--   list     which priority list of which queue carries its doorbell
--   order    number of its first doorbell; raises the list's watermark when the job is claimed (0: never)
--   bell     number of its newest doorbell; 0 when no message announces the job
--   alarm    when a reaper must ring, or look again for the doorbell
--   lease    until when its worker may be silent, on the clock of `watched`

local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local stamp = string.format('%s.%06d', clock[1], clock[2])

local quote = cjson.encode

local function moment(seconds)
  return string.format('%.6f', seconds)
end

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
  local gap = at and math.max(0, now - tonumber(at)) or 0
  return tonumber(seconds or '0') + (gap > CONFIG.lease_s / 2 and CONFIG.lease_s / 4 or gap)
end

local function watch()
  local seconds = watched()
  redis.call('HSET', KEY.watch, 'at', stamp, 'seconds', moment(seconds))
  return seconds
end

local function count(what)
  redis.call('HINCRBY', KEY.counts, what, 1)
end

-- The stream's entry ids are `<seq>-0`: a reader can ask for everything after a seq.
local function write_event(id, seq, attempt, fragment)
  local event = '{"v":' .. EVENT.version .. ',"job_id":' .. quote(id) .. ',"seq":' .. seq .. ',"attempt":' .. attempt
    .. ',"ts":' .. stamp .. ',' .. fragment .. '}'
  redis.call('XADD', KEY.events .. id, seq .. '-0', 'event', event)
  redis.call('PUBLISH', KEY.events .. id, event)
  return event
end

local function emit(id, attempt, fragment)
  local seq = redis.call('HINCRBY', KEY.job .. id, 'seq', 1)
  return write_event(id, seq, attempt, fragment), seq
end

-- When must a reaper look at a queued job: at its alarm or at its deadline, whichever comes first.
local function schedule(id, alarm, deadline)
  local due = alarm and deadline and math.min(alarm, deadline) or alarm or deadline
  if due then
    redis.call('ZADD', KEY.due, moment(due), id)
  else
    redis.call('ZREM', KEY.due, id)
  end
end

-- The index that `list_jobs` reads: bounded in number, cleared of expired rows as new ones come, and gone when no job has come for
-- as long as a row could be kept that waited no longer than a deadline may be.
local MAX_LISTED = 100000
local MAX_WAIT_S = 7 * 86400

local function list_under(tenant, id)
  local key = KEY.jobs .. tenant
  redis.call('ZADD', key, stamp, id)
  redis.call('EXPIRE', key, CONFIG.result_ttl_s + MAX_WAIT_S)
  redis.call('ZREMRANGEBYRANK', key, 0, -MAX_LISTED - 1)
  for _, oldest in ipairs(redis.call('ZRANGE', key, 0, 1)) do
    if redis.call('EXISTS', KEY.job .. oldest) == 0 then
      redis.call('ZREM', key, oldest)
    end
  end
end

-- From now on a doorbell with this number is expected in the job's list.
local function await_doorbell(id, row, bell)
  redis.call('HSET', KEY.job .. id, 'bell', bell)
  redis.call('HDEL', KEY.job .. id, 'alarm', 'not_before')
  redis.call('ZADD', KEY.waiting .. row.list, bell, id)
  redis.call('SADD', KEY.lists, row.list)
  schedule(id, nil, tonumber(row.deadline))
end

-- Ends an attempt without ending the job. No doorbell announces it until a reaper rings, after `delay_s`.
local function requeue(id, row, reason, delay_s)
  local again_at = now + delay_s
  redis.call('HSET', KEY.job .. id, 'status', 'queued', 'queued_at', stamp, 'bell', 0,
    'alarm', moment(again_at), 'not_before', moment(again_at))
  redis.call('HDEL', KEY.job .. id, 'worker', 'token', 'lease')
  schedule(id, again_at, tonumber(row.deadline))
  emit(id, row.attempt, '"type":"job.retrying","reason":' .. quote(reason))
end

-- ISO 8601 in UTC of `now`; days to date after H. Hinnant, "chrono-compatible low-level date algorithms".
local function iso8601()
  local seconds = tonumber(clock[1])
  local z = math.floor(seconds / 86400) + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  local time = seconds % 86400
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%06d+00:00', year, month, day,
    math.floor(time / 3600), math.floor(time / 60) % 60, time % 60, clock[2])
end

-- Ends a job for good. `fragment`: body of the final event. `outcome`: JSON of Celery's `result` member.
-- ZREM comes first for the reason told at `go_on_when_full`.
local function final(id, row, status, fragment, outcome)
  redis.call('ZREM', KEY.due, id)
  redis.call('ZREM', KEY.waiting .. row.list, id)
  local event = emit(id, row.attempt, fragment)
  redis.call('HSET', KEY.job .. id, 'status', status, 'finished', stamp, 'final', event)
  redis.call('HDEL', KEY.job .. id, 'alarm', 'not_before', 'token', 'lease')
  redis.call('DECR', KEY.depth .. row.model)
  local meta = '{"status":"' .. CELERY_STATE[status] .. '","result":' .. outcome
    .. ',"traceback":null,"children":[],"date_done":"' .. iso8601() .. '","task_id":' .. quote(id) .. '}'
  redis.call('SET', KEY.result .. id, meta, 'EX', CONFIG.result_ttl_s)
  redis.call('PUBLISH', KEY.result .. id, meta)
  redis.call('EXPIRE', KEY.job .. id, CONFIG.result_ttl_s)
  redis.call('EXPIRE', KEY.events .. id, CONFIG.events_ttl_s)
  count(status)
end

-- What the last attempt wrote before it ended without a result: its text as JSON, and its number of tokens.
local function partial(id, started_seq)
  local text, num_tokens = {}, 0
  if started_seq then
    for _, entry in ipairs(redis.call('XRANGE', KEY.events .. id, started_seq .. '-0', '+')) do
      local event = cjson.decode(entry[2][2])
      if event.type == 'output.delta' then
        text[#text + 1] = event.text
        num_tokens = num_tokens + event.num_tokens
      end
    end
  end
  return quote(table.concat(text)), string.format('%d', num_tokens)
end

-- Ends a job that no worker can end any more. `row` needs: model list attempt started_seq.
local function unanswered(id, row, status, code, message)
  local text, num_tokens = partial(id, row.started_seq)
  local retryable = RETRYABLE[code] or 'false'
  local fragment = '"type":"job.' .. status .. '","error":{"code":"' .. code .. '","message":' .. quote(message)
    .. ',"retryable":' .. retryable .. '},"partial_text":' .. text
    .. ',"usage":{"prompt_tokens":0,"completion_tokens":' .. num_tokens .. ',"images":0,"frames":0}'
  local outcome = '{"exc_type":"' .. FAILURE.class .. '","exc_module":"' .. FAILURE.module
    .. '","exc_message":["' .. code .. '",' .. quote(message) .. ',' .. retryable .. ']}'
  final(id, row, status, fragment, outcome)
end

local function expire(id, row)
  local allowed_s = tonumber(row.deadline) - tonumber(row.created)
  unanswered(id, row, 'expired', 'expired', string.format('deadline_s: %.6g s passed while the job was queued', allowed_s))
end

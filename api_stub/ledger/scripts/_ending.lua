-- The one way in which a job ends.

-- ISO 8601 in UTC of Redis' clock; days to date after H. Hinnant, "chrono-compatible low-level date algorithms".
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

-- Writes what Celery's result backend holds of a finished task, and notifies whoever waits for it.
-- `outcome`: JSON of Celery's `result` member. `unless_known`: a result that is there stays.
local function write_result(id, state, outcome, unless_known)
  local meta = '{"status":"' .. state .. '","result":' .. outcome .. ',"traceback":null,"children":[],"date_done":"' .. iso8601()
    .. '","task_id":' .. quote(id) .. '}'
  if redis.call('SET', KEY.result .. id, meta, 'EX', CONFIG.result_ttl_s, unpack(unless_known and {'NX'} or {})) then
    redis.call('PUBLISH', KEY.result .. id, meta)
  end
end

-- So many messages of a list are searched for one doorbell.
local MAX_SEARCHED = 1000

-- Nobody takes the messages of a model that no worker serves: the ended job's doorbell would stay for ever, and the counter of a name
-- that nobody has heard of.
local function forget_doorbell(id, row)
  local ended = read(id, 'task', 'priority', 'bell')
  ended.model, ended.list = row.model, row.list
  local key, message = doorbell(id, ended, ended.bell or '0')
  local length = redis.pcall('LLEN', key)
  if type(length) == 'number' and length <= MAX_SEARCHED then
    redis.call('LREM', key, -1, message)
  end
  if redis.call('GET', KEY.depth .. row.model) == '0' then
    redis.call('DEL', KEY.depth .. row.model)
  end
end

-- Ends a job for good. `fragment`: body of the final event. `outcome`: JSON of Celery's `result` member.
-- ZREM comes first for the reason given at `go_on_when_full`. `row` needs: status model list tenant worker attempt.
local function final(id, row, status, fragment, outcome)
  redis.call('ZREM', KEY.due, id)
  redis.call('ZREM', KEY.unserved, id)
  if row.status == 'queued' then
    stop_waiting(id, row)
    leave_line(id, row)
  else
    stop_running(id, row)
  end
  local event = emit(id, row.attempt, fragment)
  redis.call('HSET', KEY.job .. id, 'status', status, 'finished', stamp, 'final', event)
  redis.call('HDEL', KEY.job .. id, 'alarm', 'not_before', 'token', 'lease')
  one_less(row.model)
  if row.status == 'queued' and not is_known(row.model) then
    forget_doorbell(id, row)
  end
  write_result(id, CELERY_STATE[status], outcome)
  redis.call('ZADD', KEY.linked, 'XX', stamp, id)
  redis.call('EXPIRE', KEY.job .. id, CONFIG.result_ttl_s)
  redis.call('EXPIRE', KEY.events .. id, CONFIG.events_ttl_s)
  count(status)
  make_room(row)
end

-- What the last attempt wrote before it ended without a result: its text as JSON, and how many tokens were generated and
-- how many the prompt has.
local function partial(id, started_seq)
  local text, num_tokens, num_read = {}, 0, 0
  if started_seq then
    for _, entry in ipairs(redis.call('XRANGE', KEY.events .. id, started_seq .. '-0', '+')) do
      local event = cjson.decode(entry[2][2])
      if event.type == 'output.delta' then
        text[#text + 1] = event.text
        num_tokens = num_tokens + event.num_tokens
      elseif event.type == 'job.progress' and event.stage == 'prefill' then
        num_read = event.total
      end
    end
  end
  return quote(table.concat(text)), string.format('%d', num_tokens), string.format('%d', num_read)
end

-- Ends a job that no worker can end any more. `row` needs what `final` needs, and started_seq.
local function unanswered(id, row, status, code, message)
  local text, num_tokens, num_read = partial(id, row.started_seq)
  local retryable = RETRYABLE[code] or 'false'
  local fragment = '"type":"job.' .. status .. '","error":{"code":"' .. code .. '","message":' .. quote(message)
    .. ',"retryable":' .. retryable .. '},"partial_text":' .. text
    .. ',"usage":{"prompt_tokens":' .. num_read .. ',"completion_tokens":' .. num_tokens .. ',"images":0,"frames":0}'
  local outcome = '{"exc_type":"' .. FAILURE.class .. '","exc_module":"' .. FAILURE.module
    .. '","exc_message":["' .. code .. '",' .. quote(message) .. ',' .. retryable .. ']}'
  final(id, row, status, fragment, outcome)
end

local function expire(id, row)
  local allowed_s = tonumber(row.deadline) - tonumber(row.created)
  unanswered(id, row, 'expired', 'expired', string.format('deadline_s: %.6g s passed while the job was queued', allowed_s))
end

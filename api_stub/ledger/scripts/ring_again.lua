-- Doorbells that a worker took and will not answer are written again, behind those that wait: only of jobs that a doorbell announces.
-- Those of a paused model are held. Answers how many were rung for.
local num_rung = 0
go_on_when_full()
for _, id in ipairs(ARGV) do
  local row = read(id, 'status', 'task', 'model', 'priority', 'list', 'tenant', 'deadline', 'bell', 'place')
  local is_announced = row.status == 'queued' and (row.bell or '0') ~= '0'
  if is_announced and is_paused(row.model) then
    stop_waiting(id, row)
    hold(id, row)
  elseif is_announced then
    ring(id, row)
    num_rung = num_rung + 1
  end
end
return num_rung

-- Doorbells that a worker took and will not answer are written again, behind those that wait: only of jobs that a doorbell announces.
-- Answers how many.
local num_rung = 0
go_on_when_full()
for _, id in ipairs(ARGV) do
  local row = read(id, 'status', 'task', 'model', 'priority', 'list', 'tenant', 'deadline', 'bell')
  if row.status == 'queued' and (row.bell or '0') ~= '0' then
    ring(id, row)
    num_rung = num_rung + 1
  end
end
return num_rung

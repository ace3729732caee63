-- Takes a job off the list of those that were given up. The job itself stays as it is, as long as its result is kept.
return redis.call('LREM', KEY.dead, 0, ARGV[1])

"""The ledger: the truth about every job, one Lua script per transition on one Redis."""

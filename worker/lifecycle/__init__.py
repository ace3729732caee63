"""A worker's life beside its jobs: leases, drain, health."""

"""How processes and devices share work: ranks, leases, signals, the device mesh."""

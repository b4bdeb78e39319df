"""Processes, devices and workers: ranks, leases, signals, the device mesh, compiled programs."""

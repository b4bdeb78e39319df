"""Which process it is, among all that any machine ever had, and whether it is known to be dead."""

import os
from pathlib import Path


def identity(pid: int) -> list[str | int]:
    """Return the boot, whose processes can be seen, and the process; nothing where it is not there.

    Nor is there anything where the system has no /proc.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")  # any bytes may be its title
        state, *fields = stat.rpartition(") ")[2].split()
        started = fields[18]  # a number is used again, but not at the same moment
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        return []
    return [] if state in "ZX" else [boot, space, os.getuid(), pid, started]


def is_dead(process: list[str | int]) -> bool:
    """Say whether it is known that a process was of this machine, since it started, and is no more.

    It is not known of processes of other users, which /proc may hide, or of other containers.
    """
    this = identity(os.getpid())
    if not this or process[:3] != this[:3]:
        return False
    return identity(int(process[3])) != process

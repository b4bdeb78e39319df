"""Folders under leases that a test holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxflat.distributed import leases
from jaxflat.storage.leased_folder import Folder


@contextmanager
def owned(path: Path) -> Iterator[Folder]:
    """Yield a folder whose lease this process holds within the block."""
    with leases.hold(path) as lease:
        yield Folder(path, lease)

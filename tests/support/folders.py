"""Folders under leases that a test holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxflat.distributed.leases import acquire_lease
from jaxflat.storage.leased_folder import Folder


@contextmanager
def owned(path: Path) -> Iterator[Folder]:
    """Yield a folder whose lease this process holds within the block."""
    with acquire_lease(path) as lease:
        yield Folder(path, lease)

"""Ways to damage a file of a folder. Each returns the name of the damaged file."""

from pathlib import Path


def flip(path: Path, chance) -> str:
    """Flip one bit of one byte."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return path.name


def truncate(path: Path, chance) -> str:
    """Remove bytes at the end, perhaps all."""
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])
    return path.name


def lose(path: Path, chance) -> str:
    path.unlink()
    return path.name


def add(path: Path, chance) -> str:
    """Add another file beside it, perhaps an empty one."""
    other = path.with_name(f"{path.name}.{chance.randrange(100)}")
    other.write_bytes(bytes(chance.randrange(3)))
    return other.name


KINDS = (flip, truncate, lose, add)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())

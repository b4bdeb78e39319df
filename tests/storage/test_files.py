"""A write that fails leaves the old file: whole writes, replacements, appended lines."""

import errno
import hashlib
import os
from contextlib import suppress

import pytest

from jaxflat.storage import files


def fail(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("content", ["text of two\nlines, é\n", b"\0bytes\xff"])
def test_a_file_holds_what_was_written_and_its_digest(tmp_path, content):
    for _ in range(2):
        files.write_whole(tmp_path / "file", content)
    raw = content.encode() if isinstance(content, str) else content
    assert (tmp_path / "file").read_bytes() == raw
    assert files.sha256(tmp_path / "file") == hashlib.sha256(raw).hexdigest()
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_write_that_fails_names_the_file_and_leaves_it_as_it_was(tmp_path, monkeypatch, name):
    files.write_whole(tmp_path / "file", "old")
    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/file'"):
        files.write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_block_that_fails_replaces_nothing(tmp_path):
    files.write_whole(tmp_path / "file", "old")
    with suppress(KeyboardInterrupt), files.replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_append_that_fails_leaves_no_part_of_the_line(tmp_path, monkeypatch):
    files.append(tmp_path / "lines", b'{"step": 1}\n')
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/lines'"):
            files.append(tmp_path / "lines", b'{"step": 2}\n')
    files.append(tmp_path / "lines", b'{"step": 3}\n')
    assert list(files.read_lines(tmp_path / "lines")) == [{"step": 1}, {"step": 3}]

"""A checkpoint is complete or absent, even with damaged files or a kill during a save."""

import errno
import itertools
import multiprocessing
import os
import random
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxflat.storage import leased_folder, manifest
from jaxflat.storage.leased_folder import Folder
from jaxflat.storage.manifest import DamagedError
from tests.support.damage import KINDS, files_of, flip
from tests.support.folders import owned


def tree(step):
    return {
        "layer": {"kernel": np.full((8, 5), step, np.float32)},
        "step": np.asarray(step, np.int32),
    }


def assert_whole(folder, steps):
    """Assert that exactly these steps exist and restore the saved arrays."""
    assert folder.steps() == list(steps)
    assert folder.mark_damaged_steps() == []
    for step in steps:
        jax.tree.map(np.testing.assert_array_equal, folder.restore(step, tree(0)), tree(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    with owned(tmp_path_factory.mktemp("saved")) as folder:
        for step in (1, 2):
            folder.save(step, tree(step))
        yield folder.path


@pytest.fixture
def copied(saved, tmp_path):
    with owned(Path(shutil.copytree(saved, tmp_path / "copied"))) as folder:
        yield folder


def test_the_manifest_lists_every_file_but_itself(saved):
    files = {path.relative_to(saved / "2").as_posix() for path in files_of(saved / "2")}
    assert len(files) > 5  # their number depends on the time of the writes
    assert manifest._read(saved / "2").keys() == files - {"manifest.json"}
    assert_whole(Folder(saved), [1, 2])


@pytest.mark.parametrize("kind", KINDS)
def test_damage_to_any_file_is_found_and_named(saved, tmp_path, kind):
    chance = random.Random(0)
    for number, file in enumerate(files_of(saved / "2")):
        directory = Path(shutil.copytree(saved, tmp_path / str(number)))
        name = kind(directory / file.relative_to(saved), chance)
        with owned(directory) as folder:
            with pytest.raises(DamagedError, match=re.escape(f"{directory}/2: ") + f".*{name}"):
                folder.restore(2, tree(0))
            (line,) = folder.mark_damaged_steps()
            assert name in line
            assert line.endswith("; renamed to damaged-2")
            assert (directory / "damaged-2").is_dir()
            assert_whole(folder, [1])


def test_any_bit_that_flips_is_found(copied, chance):
    files = [file for file in files_of(copied.path / "2") for _ in range(file.stat().st_size)]
    for _ in range(50):
        file = chance.choice(files)
        before = file.read_bytes()
        name = flip(file, chance)
        with pytest.raises(DamagedError, match=name):
            copied.verify(2)
        file.write_bytes(before)
    assert_whole(copied, [1, 2])


def test_a_newly_damaged_step_replaces_an_older_one(copied):
    for _ in range(2):
        (copied.path / "2" / "_METADATA").unlink()
        assert len(copied.mark_damaged_steps()) == 1
        assert_whole(copied, [1])
        copied.save(2, tree(2))
    assert_whole(copied, [1, 2])


def test_a_bad_sector_is_damage(copied, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(manifest, "_describe", fail)
    with pytest.raises(DamagedError, match="_CHECKPOINT_METADATA cannot be read: Input/output"):
        copied.verify(2)


class Killed(BaseException):
    """Simulates kill -9: no code cleans up after it."""


MOMENTS = {
    "orbax": (ocp.StandardCheckpointer, "save"),
    "manifest": (manifest, "write"),
    "hash": (manifest, "_describe"),
    "push": (os, "fsync"),
    "rename": (Path, "rename"),
    "make folder": (Path, "mkdir"),
}


def die_at(monkeypatch, owner, name, number):
    """Let a function raise Killed at a moment: 0 before its first call, 1 after it, and so on."""
    function, moments = getattr(owner, name), itertools.count()

    def die_now():
        if next(moments) == number:
            monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
            raise Killed

    def call(*arguments, **keywords):
        die_now()
        result = function(*arguments, **keywords)
        die_now()
        return result

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_death_at_any_moment_of_a_save_leaves_whole_steps(copied, monkeypatch, moment):
    for number in itertools.count():
        with monkeypatch.context() as patched:
            die_at(patched, *MOMENTS[moment], number)
            try:
                copied.save(3, tree(3))
                break
            except Killed:
                pass
        found = copied.steps()
        assert found in ([1, 2], [1, 2, 3])
        assert_whole(copied, found)
        if found == [1, 2, 3]:
            copied.delete_step(3)
    assert number > 1  # it died before and after
    assert_whole(copied, [1, 2, 3])
    assert {path.name for path in copied.path.iterdir()} == {"1", "2", "3"}


def test_a_save_that_fails_cleans_up_and_says_where(copied, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=f"No space left on device: '{copied.path}/3'"):
        copied.save(3, tree(3))
    assert {path.name for path in copied.path.iterdir()} == {"1", "2"}
    assert_whole(copied, [1, 2])


def test_a_save_whose_folders_cannot_be_made_leaves_no_thread(copied, monkeypatch):
    """Threads that wait for the folders would keep the process from ending for five minutes."""
    make, threads = os.mkdir, {*threading.enumerate()}

    def fail(path, *arguments, **keywords):
        if "/new" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        make(path, *arguments, **keywords)

    monkeypatch.setattr(leased_folder, "GRACE", 0)
    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(OSError, match="Input/output error"):
        copied.save(3, tree(3))
    assert {*threading.enumerate()} <= threads
    assert_whole(copied, [1, 2])


def save_for_ever(directory):
    with owned(directory) as folder:
        for step in itertools.count(max(folder.steps(), default=0) + 1):
            folder.save(step, tree(step))
            for old in folder.steps()[:-2]:
                folder.delete_step(old)


@pytest.mark.slow
def test_killed_while_it_saves(saved, tmp_path, chance):
    """Kill a process that saves, at a random moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jaxflat.storage.leased_folder"])
    process = context.Process(target=save_for_ever, args=(tmp_path,))
    process.start()
    while len(Folder(tmp_path).steps()) < 2:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.5))
    process.kill()
    process.join()
    found = Folder(tmp_path).steps()
    assert len(found) in (2, 3)
    assert_whole(Folder(tmp_path), found)


@pytest.mark.slow
def test_a_save_whose_folder_another_worker_deletes_raises_and_prints_nothing(
    tmp_path, monkeypatch
):
    """Without the mend about half of the saves print "RuntimeError: Event loop is closed"."""
    printed, ended, chance = [], threading.Event(), random.Random(0)
    monkeypatch.setattr(sys, "unraisablehook", lambda error: printed.append(error.exc_value))

    def delete_unfinished():
        while not ended.wait(chance.uniform(0.002, 0.02)):
            for path in tmp_path.glob("run/.unfinished*"):
                shutil.rmtree(path, ignore_errors=True)

    deleting = threading.Thread(target=delete_unfinished, daemon=True)
    deleting.start()
    failures = 0
    with owned(tmp_path / "run") as folder:
        for step in range(8):
            try:
                folder.save(step, {str(i): np.ones(300_000, np.float32) for i in range(4)})
            except (OSError, ValueError):
                failures += 1
    ended.set()
    deleting.join()
    assert failures
    assert not printed

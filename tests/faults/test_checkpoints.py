"""A step of a checkpoint is whole or absent: damaged files, and deaths during a save."""

import errno
import itertools
import multiprocessing
import os
import random
import re
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxflat.storage import checkpoints, manifest
from jaxflat.storage.manifest import DamagedError
from tests.support.damage import KINDS, files_of, flip


def tree(step):
    return {
        "layer": {"kernel": np.full((8, 5), step, np.float32)},
        "step": np.asarray(step, np.int32),
    }


def assert_whole(directory, steps):
    """Assert that exactly these steps exist and hold what was saved."""
    assert checkpoints.steps(directory) == list(steps)
    assert checkpoints.mark_damaged_steps(directory) == []
    for step in steps:
        jax.tree.map(
            np.testing.assert_array_equal, checkpoints.restore(directory, step, tree(0)), tree(step)
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        checkpoints.save(directory, step, tree(step))
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copied"))


def test_the_manifest_lists_every_file_but_itself(saved):
    files = {path.relative_to(saved / "2").as_posix() for path in files_of(saved / "2")}
    assert len(files) > 10
    assert manifest._read(saved / "2").keys() == files - {"manifest.json"}
    assert_whole(saved, [1, 2])


@pytest.mark.parametrize("kind", KINDS)
def test_damage_to_any_file_is_found_and_named(saved, tmp_path, kind):
    chance = random.Random(0)
    for number, file in enumerate(files_of(saved / "2")):
        directory = Path(shutil.copytree(saved, tmp_path / str(number)))
        name = kind(directory / file.relative_to(saved), chance)
        with pytest.raises(DamagedError, match=re.escape(f"{directory}/2: ") + f".*{name}"):
            checkpoints.restore(directory, 2, tree(0))
        (line,) = checkpoints.mark_damaged_steps(directory)
        assert name in line
        assert line.endswith("; renamed to damaged-2")
        assert (directory / "damaged-2").is_dir()
        assert_whole(directory, [1])


def test_any_bit_that_flips_is_found(copied, chance):
    files = [file for file in files_of(copied / "2") for _ in range(file.stat().st_size)]
    for _ in range(50):
        file = chance.choice(files)
        before = file.read_bytes()
        name = flip(file, chance)
        with pytest.raises(DamagedError, match=name):
            checkpoints.verify(copied, 2)
        file.write_bytes(before)
    assert_whole(copied, [1, 2])


def test_a_newly_damaged_step_replaces_an_older_one(copied):
    for _ in range(2):
        (copied / "2" / "_METADATA").unlink()
        assert len(checkpoints.mark_damaged_steps(copied)) == 1
        assert_whole(copied, [1])
        checkpoints.save(copied, 2, tree(2))
    assert_whole(copied, [1, 2])


def test_a_bad_sector_is_damage(copied, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(manifest, "_describe", fail)
    with pytest.raises(DamagedError, match="_CHECKPOINT_METADATA cannot be read: Input/output"):
        checkpoints.verify(copied, 2)


class Killed(BaseException):
    """Stands for kill -9: no code cleans up after it."""


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
                checkpoints.save(copied, 3, tree(3))
                break
            except Killed:
                pass
        found = checkpoints.steps(copied)
        assert found in ([1, 2], [1, 2, 3])
        assert_whole(copied, found)
        if found == [1, 2, 3]:
            checkpoints.delete(copied, 3)
    assert number > 1  # it died before and after
    assert_whole(copied, [1, 2, 3])
    assert {path.name for path in copied.iterdir()} == {"1", "2", "3"}


def test_a_save_that_fails_cleans_up_and_says_where(copied, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=f"No space left on device: '{copied}/3'"):
        checkpoints.save(copied, 3, tree(3))
    assert {path.name for path in copied.iterdir()} == {"1", "2"}
    assert_whole(copied, [1, 2])


def save_for_ever(directory):
    for step in itertools.count(max(checkpoints.steps(directory), default=0) + 1):
        checkpoints.save(directory, step, tree(step))
        for old in checkpoints.steps(directory)[:-2]:
            checkpoints.delete(directory, old)


@pytest.mark.slow
def test_killed_while_it_saves(saved, tmp_path, chance):
    """Kill a process that saves, at a random moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jaxflat.storage.checkpoints"])
    process = context.Process(target=save_for_ever, args=(tmp_path,))
    process.start()
    while len(checkpoints.steps(tmp_path)) < 2:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.5))
    process.kill()
    process.join()
    found = checkpoints.steps(tmp_path)
    assert len(found) in (2, 3)
    assert_whole(tmp_path, found)

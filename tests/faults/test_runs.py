"""A run names damaged checkpoints, resumes from an earlier one and ends with the same bits."""

import gc
import random
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxflat import main
from jaxflat.console import Display
from jaxflat.distributed import preemption
from jaxflat.measure import __main__ as measure
from jaxflat.runs import recovery, stages
from jaxflat.storage.files import write_json
from jaxflat.storage.leased_folder import Folder
from jaxflat.sweeps import sweep
from tests.support.damage import KINDS, files_of
from tests.support.images import TRAIN, config, run, take_images, warnings_in
from tests.sweeps.test_sweep import contents, saved_arrays

pytestmark = pytest.mark.slow

REMADE = "training repeats its steps"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of an undisturbed run, and copies of it during the run."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        images = take_images(root / "whole", root / "images", monkeypatch)
    return root / "whole", images


@pytest.fixture(scope="module")
def expected(undisturbed):
    return contents(undisturbed[0]), saved_arrays(undisturbed[0])


@pytest.fixture
def copied(undisturbed, tmp_path):
    """A finished run without its evaluation, which can only be made from its checkpoints."""
    workdir = Path(shutil.copytree(undisturbed[0], tmp_path / "copied"))
    (workdir / "run" / "evaluation.jsonl").unlink()
    return workdir


@pytest.fixture
def starts(monkeypatch):
    """The step of the trunk from which each run resumed."""
    found, resume = [], recovery.resume

    def remember(*arguments):
        state, curve = resume(*arguments)
        found.append(int(state.step))
        return state, curve

    monkeypatch.setattr(recovery, "resume", remember)
    return found


def assert_as_expected(workdir, expected):
    """Without damaged-* folders, results, parameters and optimizer states are the same bits."""
    for folder in list(workdir.glob("*/*/damaged-*")):
        shutil.rmtree(folder)
    files, arrays = contents(workdir), saved_arrays(workdir)
    assert files == expected[0]
    assert arrays.keys() == expected[1].keys()
    jax.tree.map(np.testing.assert_array_equal, arrays, expected[1])


def damage(step, chance):
    """Damage a file of a step; return the file's name."""
    return chance.choice(KINDS)(chance.choice(files_of(step)), chance)


def test_whatever_is_damaged_at_whatever_moment_the_run_ends_the_same(
    undisturbed, expected, tmp_path, capsys, starts, chance
):
    """The newest recovery checkpoint is damaged each time, and some of the others."""
    *unfinished, _ = (path for path in undisturbed[1] if (path / "run/recovery").exists())
    image = chance.choice(unfinished)
    workdir = Path(shutil.copytree(image, tmp_path / "image"))
    recovery = workdir / "run" / "recovery"
    *before, newest = Folder(recovery).steps()
    others = [recovery / str(step) for step in before]
    others += [*workdir.glob("run/checkpoints/*"), *workdir.glob("run/projected/*")]
    hit = [recovery / str(newest), *chance.sample(others, chance.randrange(len(others) // 2 + 1))]
    names = {str(step): damage(step, chance) for step in hit}
    run(workdir)
    said = warnings_in(capsys.readouterr().err)
    assert said.keys() == names.keys()
    for step, what in said.items():
        assert names[step] in what
        assert what.endswith(f"; renamed to damaged-{Path(step).name}; {REMADE}")
    assert starts[0] in {*before, 0, 10}  # 10: the shared prefix
    assert_as_expected(workdir, expected)


def test_the_recovery_checkpoint_before_a_damaged_one_is_used(copied, expected, starts, capsys):
    (copied / "run" / "recovery" / "16" / "_METADATA").write_bytes(b"")
    run(copied)
    what = warnings_in(capsys.readouterr().err)[f"{copied}/run/recovery/16"]
    assert what.startswith("_METADATA has 0 bytes, not ")
    assert starts == [14]
    assert_as_expected(copied, expected)


@pytest.mark.parametrize(("step", "start"), [("checkpoints/7", 0), ("projected/16", 16)])
def test_a_damaged_measured_checkpoint_is_made_again(copied, expected, starts, step, start):
    shutil.rmtree(copied / "trunks")
    (copied / "run" / step / "manifest.json").unlink()
    run(copied)
    assert starts == [start]
    assert (copied / "trunks").exists() == (start == 0)
    assert_as_expected(copied, expected)


def test_a_point_without_checkpoints_and_measures_is_trained_again(undisturbed, tmp_path, starts):
    """Its flatness and its probes are missing, although its status says that it is done."""
    workdir = Path(shutil.copytree(undisturbed[0], tmp_path / "results"))
    for name in ("trunks", "run/checkpoints", "run/projected", "run/recovery"):
        shutil.rmtree(workdir / name)
    write_json(workdir / "run" / "status.json", {"state": "done"})
    run(workdir)
    assert starts == [0]


def test_a_finished_point_needs_no_checkpoints_until_it_is_measured_again(
    undisturbed, expected, tmp_path, starts, monkeypatch
):
    whole, _ = undisturbed
    workdir = Path(shutil.copytree(whole, tmp_path / "results"))
    for name in ("trunks", "run/checkpoints", "run/projected", "run/recovery"):
        shutil.rmtree(workdir / name)
    write_json(workdir / "run" / "status.json", {"state": "done"})
    with monkeypatch.context() as patched:  # the run has only the first measurement
        patched.setattr(stages, "MEASUREMENTS", stages.MEASUREMENTS[:1])
        run(workdir)
    assert starts == []
    assert not (workdir / "run" / "recovery").exists()
    (workdir / "run" / "evaluation.jsonl").unlink()
    run(workdir)
    assert starts == [0]
    assert_as_expected(workdir, expected)


def test_a_death_while_it_goes_back_loses_nothing(copied, expected, monkeypatch, starts):
    """Recovery checkpoints after the damaged step are not used, even if the process dies."""
    shutil.rmtree(copied / "trunks")
    (copied / "run" / "checkpoints" / "7" / "_METADATA").unlink()

    class Killed(BaseException):
        pass

    def die(_, completed, __):
        if completed == moments[-1]:
            raise Killed

    moments = []
    for moment in (2, 4):
        moments.append(moment)
        with monkeypatch.context() as patched:
            patched.setattr(Display, "advance_stage", die)
            with pytest.raises(Killed):
                run(copied)
    run(copied)
    assert starts == [0, 0, 3]
    assert_as_expected(copied, expected)


def test_a_damaged_shared_prefix_is_not_used(undisturbed, tmp_path, capsys, starts):
    shutil.copytree(undisturbed[0] / "trunks", tmp_path / "trunks")
    (prefix,) = (tmp_path / "trunks").iterdir()
    (prefix / "recovery" / "10" / "extra").write_text("")
    run(tmp_path, [{"phases.drift.steps": 8}])
    what = warnings_in(capsys.readouterr().err)[f"{prefix}/recovery/10"]
    assert what == (
        "extra is not in manifest.json; this shared prefix is renamed "
        f"damaged-{prefix.name} and not used"
    )
    assert starts == [0]
    assert {path.name for path in prefix.parent.iterdir()} == {
        prefix.name,
        f"damaged-{prefix.name}",
    }
    whole, again = (saved_arrays(path) for path in (undisturbed[0] / "trunks", tmp_path / "trunks"))
    again = {name: arrays for name, arrays in again.items() if "damaged" not in name}
    jax.tree.map(np.testing.assert_array_equal, whole, again)


@pytest.mark.parametrize("step", ["checkpoints/7", "projected/16"])
def test_measure_names_what_is_damaged_and_leaves_it(copied, monkeypatch, capsys, step):
    monkeypatch.setattr(preemption, "install_handlers", lambda: None)
    (copied / "run" / step / "_METADATA").write_bytes(b"")
    before = sorted(copied.rglob("*"))
    assert measure.main([f"--checkpoint={copied}/run/{step}"]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"error: {copied}/run/{step}: _METADATA has 0 bytes, not ")
    assert said.out == ""
    assert sorted(copied.rglob("*")) == before


def test_measuring_alone_trains_nothing(copied, capsys):
    shutil.rmtree(copied / "run" / "checkpoints" / "7" / "d")
    reason = sweep.run(config(), [{}], copied, stages=("flatness",))["run"]
    assert "checkpoints/7: d/" in reason
    assert reason.endswith("is missing")
    assert Folder(copied / "run" / "checkpoints").steps() == [7, 14, 16]
    assert "damaged" not in capsys.readouterr().err


def test_as_many_recovery_checkpoints_are_kept_as_asked(undisturbed, expected, tmp_path):
    """Also if the folder is older and has more of them."""
    image = next(path for path in undisturbed[1] if (path / "run/recovery/14").exists())
    workdir = Path(shutil.copytree(image, tmp_path / "image"))
    assert Folder(workdir / "run" / "recovery").steps() == [10, 14]
    keeps = config()
    keeps.training.keep = 1
    assert sweep.run(keeps, [{}], workdir, stages=TRAIN) == {}
    assert Folder(workdir / "run" / "recovery").steps() == [16]
    assert contents(workdir) == expected[0]


CONFIG_FILE = """
from tests.support import images
get_config = lambda scale: images.config()
"""


@pytest.fixture
def disk(tmp_path):
    """The folder of a small separate disk, and a function that sets its size in bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size, *options):
        how = ",".join((f"size={size}", *options))
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)], capture_output=True
        ).returncode

    if resize(1 << 20):
        pytest.skip("only root may mount a disk")
    yield folder, lambda size: resize(size, "remount")
    subprocess.run(["umount", str(folder)], check=True)


# If the disk fills while orbax writes, some of its threads end after its error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    undisturbed, expected, disk, tmp_path, monkeypatch, capsys, disk_trial
):
    monkeypatch.setattr(preemption, "install_handlers", lambda: None)
    (tmp_path / "tiny.py").write_text(CONFIG_FILE)
    folder, resize = disk
    workdir = folder / "work"
    command = [f"--config={tmp_path}/tiny.py", f"--workdir={workdir}", "--stages=train"]
    pages = sum(-(-file.stat().st_size // 4096) for file in files_of(undisturbed[0]))
    resize(4096 * random.Random(disk_trial).randrange(pages // 10, pages))
    assert main.main(command) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: [Errno 28] No space left on device: '" + str(workdir))
    assert line.endswith("'. Free some space and rerun the same command to continue.")
    left = [path.name for path in workdir.rglob("*")]
    assert not [name for name in left if name.startswith(".")]
    resize(16 << 20)
    assert main.main(command) == 0
    assert capsys.readouterr().err == ""  # no existing step is damaged
    assert_as_expected(workdir, expected)
    gc.collect()  # otherwise a later test gets the warnings about those threads


def test_all_that_is_measured_is_the_same_after_damage(undisturbed, tmp_path):
    stages = ("train", "flatness", "probes")
    workdirs = [Path(shutil.copytree(undisturbed[0], tmp_path / name)) for name in ("left", "hit")]
    (workdirs[1] / "run" / "checkpoints" / "14" / "_METADATA").unlink()
    for workdir in workdirs:
        run(workdir, stages=stages)
    assert contents(workdirs[0]) == contents(workdirs[1])

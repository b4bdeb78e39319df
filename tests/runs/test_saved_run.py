"""A run's checkpoint, loaded from its folder, computes what the run's model computed."""

import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from jaxflat import runs
from jaxflat.config import param
from jaxflat.config.validation import InputError
from jaxflat.runs import builders
from jaxflat.storage.leased_folder import Folder
from jaxflat.storage.manifest import DamagedError
from jaxflat.sweeps import sweep
from tests.support import damage
from tests.support.sweeps import tiny_config

pytestmark = pytest.mark.slow  # they train a run

TOKENS_BXT = jnp.asarray([[0, 3, 5, 1], [2, 2, 4, 0]])
LENGTHS_B = jnp.asarray([4, 3])


def logits_of(model, params) -> np.ndarray:
    logits_BxTxV, _ = model.apply({"params": params}, TOKENS_BXT, LENGTHS_B)
    return np.asarray(logits_BxTxV)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """Train a run; return its folder, and the logits of the parameters that it held, by folder."""
    config = tiny_config()
    config.phase_order = ("pretrain",)
    del config.phases.drift
    pretrain = {"steps": 4, "anneal_steps": 2, "checkpoint_steps": (2, 4)}
    config.phases.pretrain.update(pretrain)
    config.phases.pretrain.projection.update(
        {"checkpoint_steps": (4,), "steps": 2, "batch_size": 8}
    )
    model = builders.make_model(FrozenConfigDict(config))
    held, save = {}, Folder.save

    def save_and_note(self, step, tree):
        if self.path.name != "recovery":
            held[f"{self.path.name}/{step}"] = logits_of(model, tree)
        save(self, step, tree)

    workdir = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "save", save_and_note)
        assert sweep.run(config, param("model.width", [8]), workdir, stages=("train",)) == {}
    (point,) = workdir.glob("width=8*")
    return point, held


def test_every_checkpoint_gives_the_logits_of_the_run(trained):
    point, held = trained
    assert set(held) == {"checkpoints/4", "checkpoints/6", "projected/6"}
    for name, logits in held.items():
        model, params, config = runs.load(point / name)
        np.testing.assert_array_equal(logits_of(model, params), logits)
        assert config.phases.pretrain.steps == 4
    assert len({logits.tobytes() for logits in held.values()}) == 3


def test_a_points_folder_gives_its_last_checkpoint(trained, tmp_path):
    point, held = trained
    copy = Path(shutil.copytree(point, tmp_path / "run"))
    for name in ("projected/6", "checkpoints/6", "checkpoints/4"):
        model, params, _ = runs.load(str(copy))
        np.testing.assert_array_equal(logits_of(model, params), held[name])
        shutil.rmtree(copy / name)
    with pytest.raises(InputError, match="has no measured checkpoint; resume"):
        runs.load(copy)


def test_a_damaged_checkpoint_is_refused(trained, tmp_path):
    copy = Path(shutil.copytree(trained[0], tmp_path / "run"))
    file = next(p for p in damage.files_of(copy / "checkpoints/4") if p.name != "manifest.json")
    damage.flip(file, random.Random(0))
    with pytest.raises(DamagedError, match=file.name):
        runs.load(copy / "checkpoints" / "4")


def test_other_folders_are_named(trained, tmp_path):
    point, _ = trained
    with pytest.raises(
        InputError, match=r"checkpoints/5: no such .*; .* checkpoints/STEP are 4, 6"
    ):
        runs.load(point / "checkpoints" / "5")
    with pytest.raises(InputError, match=r"config\.json: unusable .* No such file"):
        runs.load(tmp_path)
    stored = json.loads((point / "config.json").read_text())
    stored["config"] |= {"phase_order": []}
    stored["config"]["model"]["name"] = "lookup_table"
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="is a lookup table, which has no parameters"):
        runs.load(tmp_path)


def test_a_run_without_phases_gives_its_initial_parameters(trained, tmp_path):
    stored = json.loads((trained[0] / "config.json").read_text())
    stored["config"] |= {"phase_order": []}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    _, params, config = runs.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, builders.init_params(config))


def test_the_example_of_the_page_on_outputs_runs(trained, capsys):
    pytest.importorskip("pandas", reason="needs pip install 'jaxflat[pandas]'")
    page = (Path(__file__).parents[2] / "docs" / "outputs.md").read_text()
    example = page.partition("```python\n")[2].partition("```")[0]
    workdir = "runs/model_size_sweep-laptop"
    assert workdir in example
    names = {}
    exec(example.replace(workdir, str(trained[0].parent)), names)
    assert names["logits_BxTxV"].shape == (1, 4, 6)

"""The probe stage: its measures of a checkpoint, and the configs that it refuses."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from jaxflat.config import base, validation
from jaxflat.distributed import sharding
from jaxflat.flatness import Estimate
from jaxflat.languages import LANGUAGES
from jaxflat.probes.linear import LabelledFeatures
from jaxflat.runs import builders, checks, measure_finetuning, measure_probes
from jaxflat.runs.measure_finetuning import finetuned_accuracies
from jaxflat.runs.measure_probes import measure
from jaxflat.runs.measure_probes import settings as settings_of
from jaxflat.runs.measurements import PartialResults
from jaxflat.runs.probe_sets import probe_sets
from jaxflat.runs.trajectory import Checkpoint
from jaxflat.storage.leased_folder import Folder
from tests.support.sweeps import tiny_config

pytestmark = pytest.mark.slow

TUNING = {"shots": 12, "num_draws": 4, "batch_size": 8, "epochs": 2, "warmup_steps": 1}


def untrained(num_devices: int = 1, **model) -> FrozenConfigDict:
    config = tiny_config()
    config.phase_order, config.phases = (), {}
    config.data_seed = config.init_seed = config.probe_seed = 0
    config.mesh.data = num_devices
    config.model.update({"num_layers": 1, **model})
    config.probes.finetune.update(TUNING)
    return FrozenConfigDict(config)


def tuned(num_devices: int, pooling: str = "mean") -> dict[str, Estimate]:
    config = ConfigDict(untrained(num_devices, cls=pooling == "cls"))
    config.probes.finetune.pooling = pooling
    config = FrozenConfigDict(config)
    params = sharding.replicate(builders.make_mesh(config), builders.init_params(config))
    (sets,) = probe_sets(config.language, config.probes, 0)
    return finetuned_accuracies(config, builders.make_model(config), params, sets, PartialResults())


@pytest.fixture(scope="module")
def on_one_device() -> dict[str, Estimate]:
    return tuned(1)


def test_every_task_and_labeling_is_fine_tuned_and_again_the_same(on_one_device):
    assert list(on_one_device) == ["finetune/state_2.map", "finetune/state_2.latent"]
    assert {estimate.over for estimate in on_one_device.values()} == {"draws+sentences"}
    again = tuned(1)
    for name, estimate in on_one_device.items():
        assert (again[name].mean, again[name].sem) == (estimate.mean, estimate.sem)


def test_a_head_on_cls_is_another_head(on_one_device):
    found = tuned(1, "cls")
    assert list(found) == list(on_one_device)
    assert any(found[name].mean != estimate.mean for name, estimate in on_one_device.items())


def test_an_lstm_has_no_cls():
    config = tiny_config()
    config.model.update({"name": "lstm", "cls": True})
    with pytest.raises(validation.InputError, match=r"model\.cls=True is for .*transformer"):
        validation.validate(config)


def test_eight_devices_fine_tune_as_one_does(on_one_device):
    on_eight = tuned(8)
    assert list(on_eight) == list(on_one_device)
    for name, one in on_one_device.items():
        assert float(on_eight[name].mean) == pytest.approx(float(one.mean), abs=1.5 / (32 * 4))
        assert float(on_eight[name].sem) == pytest.approx(float(one.sem), rel=0.1)


def test_devices_that_fine_tune_say_nothing_to_each_other():
    """All steps of a job are on one device."""
    config = untrained(8)
    mesh = builders.make_mesh(config)
    params = sharding.replicate(mesh, builders.init_params(config))
    (sets,) = probe_sets(config.language, config.probes, 0)
    settings = config.probes.finetune
    parts = (sets.finetune, sets.validation, sets.test)
    compiled = measure_finetuning._correct.lower(
        builders.make_model(config), mesh, settings, sets.num_classes, params, *parts,
        jax.random.key(0), np.asarray([1e-3], np.float32), 1,
        np.repeat(np.arange(4), 2), np.tile(np.arange(2), 4),
    ).compile()  # fmt: skip
    text = compiled.as_text()
    assert "while" in text
    kinds = ("all-reduce(", "all-gather(", "all-to-all(", "collective-permute(")
    found = [line for line in text.splitlines() if any(kind in line for kind in kinds)]
    assert not found


def represented(config: FrozenConfigDict) -> tuple[jax.Array, ...]:
    """Return the features of the training, validation and test sentences."""
    mesh, (sets,) = builders.make_mesh(config), probe_sets(config.language, config.probes, 0)
    params = sharding.replicate(mesh, builders.init_params(config))
    parts = [part[0] for part in (sets.train, sets.validation, sets.test)]
    how = config.probes.pooling, (), mesh, builders.make_model(config)
    return measure_probes._featurize(*how, params, parts)[0]


def test_eight_devices_divide_the_features_of_one():
    for one, eight in zip(*(represented(untrained(number)) for number in (1, 8)), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-6)
        assert eight.addressable_shards[0].data.size == one.size // 8


@pytest.mark.parametrize("model", ["transformer", "lookup_table"])
def test_eight_devices_probe_as_one_does(model):
    """Accuracies may differ by a sentence, where rounding decides between two classes."""
    one, eight = (
        dict(measure(config, Folder(Path("unused")), Checkpoint(0), measures, PartialResults()))
        for config in (untrained(1, name=model), untrained(8, name=model))
        for measures in (["linear_probe", "belief_state"],)
    )
    for name, estimates in one.items():
        assert list(eight[name]) == list(estimates)
        for key, estimate in estimates.items():
            tolerance = 1.5 / 256 if name == "linear_probe" else 1e-4
            assert float(eight[name][key].mean) == pytest.approx(
                float(estimate.mean), abs=tolerance
            )


@pytest.mark.parametrize("num_sentences", [1, 511, 512, 513, 1025])
def test_slices_hold_every_sentence_in_order(num_sentences):
    numbers_SxB = measure_probes._slices(np.arange(num_sentences), 8)
    assert numbers_SxB.shape[1] % 8 == 0
    assert numbers_SxB.shape[1] <= measure_probes.SLICE
    assert numbers_SxB.size - num_sentences < 8 * len(numbers_SxB)
    np.testing.assert_array_equal(numbers_SxB.ravel()[:num_sentences], np.arange(num_sentences))


def test_devices_divide_the_memory_of_many_features():
    """49,152: a model of width 1,536 with 32 positions."""

    def memory(num_devices: int) -> int:
        mesh = sharding.make_mesh(num_devices)

        def part(number: int, *draws: int) -> LabelledFeatures:
            features = np.zeros((*draws, number, 49_152), np.float32)
            labels = (np.zeros((*draws, 2, number), dtype) for dtype in (np.int32, np.bool_))
            return LabelledFeatures(jax.jit(partial(sharding.divide, mesh))(features), *labels)

        parts = part(64, 2), part(32), part(64)
        fits = measure_probes._probe_correct.lower(
            *parts, np.ones(4, np.float32), shots=(64,), num_classes=10, iterations=20
        ).compile()
        planned = fits.memory_analysis()
        return planned.argument_size_in_bytes + planned.temp_size_in_bytes

    assert memory(8) < memory(1) / 6


def test_a_lookup_table_has_beliefs_but_nothing_to_fine_tune():
    config = untrained(name="lookup_table")
    measures = list(settings_of(config))
    assert measures == ["linear_probe", "belief_state"]
    found = dict(measure(config, Folder(Path("unused")), Checkpoint(0), measures, PartialResults()))
    assert list(found["belief_state"]) == ["belief_state/state_2"]


@pytest.mark.parametrize(
    ("name", "spans"),
    [
        ("hmm", {"state_3": (2, 3), "state_6": (5, 6)}),
        ("balanced_tree", {"span_0_8": (0, 8), "span_0_4": (0, 4), "span_4_8": (4, 8)}),
        ("pcfg", {"root": (0, 8), "span_0_4": (0, 4)}),
    ],
)
def test_a_task_says_which_words_it_is_about(name, spans):
    language = LANGUAGES[name](0, **base().language[name])
    assert {task: found.span for task, found in language.tasks.items()} == spans


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"finetune.shots": -1}, r"probes\.finetune\.shots=-1 must not be negative"),
        ({"finetune.epochs": 0}, r"probes\.finetune\.epochs=0 must be at least 1"),
        ({"finetune.learning_rates": ()}, r"probes\.finetune\.learning_rates=\(\) must name"),
        ({"finetune.pooling": "first"}, r"probes\.finetune\.pooling: 'first' is not one of .*cls"),
        (
            {"finetune.pooling": "cls"},
            r"probes\.finetune\.pooling='cls' needs a transformer with model\.cls=True",
        ),
        ({"pooling": "cls"}, r"probes\.pooling: 'cls' is not one of concatenate, mean"),
        ({"finetune.adamw.b2": 1.0}, r"probes\.finetune\.adamw\.b2=1\.0 must be below 1"),
        ({"projected_dimension": -2}, r"probes\.projected_dimension=-2 must not be negative"),
        ({"finetune.batch_size": 25}, r"batch_size=25 exceeds epochs \* shots = 24"),
        ({"finetune.warmup_steps": 3}, r"warmup_steps=3 must be less than the 3 steps"),
    ],
)
def test_bad_settings_are_refused_in_a_line_that_names_them(changed, message):
    config = tiny_config()
    config.probes.finetune.update(TUNING)
    with config.unlocked():
        config.probes.update_from_flattened_dict(changed)
    with pytest.raises(ValueError, match=message):
        checks.check_config(FrozenConfigDict(validation.validate(config)))

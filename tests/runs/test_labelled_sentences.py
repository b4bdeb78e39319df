"""A shot is a sentence with a label: how many are drawn, which ones, and when that is refused."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from jaxflat.config.validation import InputError
from jaxflat.languages.sentences import Sentences
from jaxflat.runs import builders, labelled_sentences
from jaxflat.runs.labelled_sentences import check_shares, draw_labelled
from jaxflat.runs.languages import make_language
from jaxflat.runs.measure_probes import measure, settings
from jaxflat.runs.measurements import PartialResults
from jaxflat.runs.probe_sets import probe_sets
from jaxflat.runs.trajectory import Checkpoint
from jaxflat.storage.leased_folder import Folder
from jaxflat.sweeps import points
from tests.support.sweeps import tiny_config

NUM_SENTENCES = 12


@dataclass(frozen=True)
class Digits:
    """Sentences of one digit, 0 to 9; task d has a label where the digit is at least d."""

    first: int = 0

    @property
    def tasks(self):
        return {str(d): AtLeast(d) for d in (0, 5, 9, 10)}

    def sample(self, key, batch_size):
        tokens_Bx1 = jnp.asarray(
            np.random.default_rng(np.asarray(jax.random.key_data(key))).integers(
                self.first, 10, (batch_size, 1)
            )
        )
        return Sentences(tokens_Bx1, jnp.ones(batch_size, jnp.int32), None)


@dataclass(frozen=True)
class AtLeast:
    digit: int

    def labels(self, sentences, labeling):
        assert labeling == "latent"
        tokens_B = sentences.tokens_BxT[:, 0]
        return tokens_B, tokens_B >= self.digit


def places(*digits):
    return [(str(digit), "latent") for digit in digits]


def digits_of(sentences):
    return np.asarray(sentences.tokens_BxT)[:, 0]


def test_each_place_has_the_first_labelled_sentences_of_one_stream():
    key, language = jax.random.key(3), Digits()
    drawn = draw_labelled(language, key, NUM_SENTENCES, places(0, 5, 9))
    size = labelled_sentences.SMALLEST_BATCH
    later = (jax.random.fold_in(key, NUM_SENTENCES + n * size) for n in range(3))
    stream = np.concatenate(
        [digits_of(language.sample(key, NUM_SENTENCES))]
        + [digits_of(language.sample(k, size)) for k in later]
    )
    for p, digit in enumerate((0, 5, 9)):
        expected = stream[stream >= digit][:NUM_SENTENCES]
        np.testing.assert_array_equal(digits_of(drawn.of(p)), expected)
    assert len(drawn.sentences.lengths_B) < 3 * NUM_SENTENCES  # the others are not kept


def test_no_key_draws_both_a_batch_and_a_sentence():
    """Languages draw sentence b of N with split(key, N)[b]."""
    keys: list[jax.Array] = []

    @dataclass(frozen=True)
    class Recorded(Digits):
        def sample(self, key, batch_size):
            keys.extend([key[None], jax.random.split(key, batch_size)])
            return super().sample(key, batch_size)

    draw_labelled(Recorded(), jax.random.key(6), NUM_SENTENCES, places(9))
    assert len(keys) > 2  # further batches are drawn
    data = np.concatenate([jax.random.key_data(some) for some in keys])
    assert len(np.unique(data, axis=0)) == len(data)


def test_where_every_sentence_has_a_label_the_sentences_are_those_of_one_batch():
    key, language = jax.random.key(4), Digits(first=9)
    drawn = draw_labelled(language, key, NUM_SENTENCES, places(0, 5, 9))
    expected = digits_of(language.sample(key, NUM_SENTENCES))
    for p in range(3):
        np.testing.assert_array_equal(digits_of(drawn.of(p)), expected)


def test_a_task_without_labels_ends_the_drawing(monkeypatch):
    monkeypatch.setattr(labelled_sentences, "SMALLEST_BATCH", NUM_SENTENCES)
    with pytest.raises(ValueError, match="task 10: 0 of 1,536 sentences have a label"):
        draw_labelled(Digits(), jax.random.key(5), NUM_SENTENCES, places(0, 10))


def lengths_from_one(*, length, tasks):
    """Return the config of an untrained lookup table on sentences of 1 to `length` words."""
    config = tiny_config()
    config.language.hmm.update({"min_length": 1, "length": length, "tasks": tasks})
    config.model.name, config.phase_order, config.phases = "lookup_table", (), {}
    config.data_seed = config.init_seed = config.probe_seed = 0
    tuning = {"shots": 8, "num_draws": 2, "batch_size": 4, "epochs": 1, "warmup_steps": 1}
    config.probes.finetune.update(tuning)
    return FrozenConfigDict(config)


@pytest.mark.slow
def test_a_task_that_few_sentences_have_is_refused_with_its_share():
    check_shares(lengths_from_one(length=40, tasks=(40,)))  # 1 in 40
    message = r"^language\.hmm\.tasks: 0\.\d+% .* of task state_160 \(latent\), .* need 1 in 64"
    with pytest.raises(ValueError, match=message):
        check_shares(lengths_from_one(length=160, tasks=(1, 160)))


@pytest.mark.slow
def test_a_task_that_few_sentences_have_is_refused_only_for_probes(tmp_path):
    config = ConfigDict(lengths_from_one(length=160, tasks=(160,)))
    listed = points.expand(config, [{}], tmp_path)
    points.check_stages(listed, ("train", "flatness", "report"))
    with pytest.raises(InputError, match=r"^language\.hmm\.tasks: .* need 1 in 64"):
        points.check_stages(listed, ("probes",))


@pytest.mark.slow
def test_tasks_of_different_sentences_have_sets_of_their_own():
    config = lengths_from_one(length=4, tasks=(1, 4))
    everywhere, long = probe_sets(config.language, config.probes, seed=0)
    assert everywhere.names == ["state_1.map", "state_1.latent"]
    assert long.names == ["state_4.map", "state_4.latent"]
    for sets in (everywhere, long):
        parts = (sets.train, sets.finetune, sets.validation, sets.test)
        shapes = [labels.shape for _, labels, _ in parts]
        assert shapes == [(2, 2, 16), (2, 2, 8), (2, 16), (2, 32)]
        assert all(valid.all() for _, _, valid in parts)
        assert all(part[1].all() for part in (sets.exact.train, sets.exact.test))
    for part in (long.train, long.finetune, long.validation, long.test):
        assert (part[0].lengths_B == 4).all()
    language = make_language(config.language)
    for draw, key in enumerate(jax.random.split(builders.purpose_key(0, "probe"), 2)):
        expected = language.sample(key, 16).tokens_BxT
        np.testing.assert_array_equal(everywhere.train[0].tokens_BxT[draw], expected)


@pytest.mark.slow
def test_every_task_is_measured_on_as_many_test_sentences():
    config = lengths_from_one(length=4, tasks=(1, 4))
    measures = settings(config)
    found = dict(measure(config, Folder(Path("no")), Checkpoint(0), measures, PartialResults()))
    assert set(found["linear_probe"]) == {
        name
        for task in ("state_1", "state_4")
        for labeling in ("map", "latent")
        for name in (
            f"bayes/{task}.{labeling}",
            *(f"linear_probe/{task}.{labeling}/{shots}" for shots in (8, 16)),
        )
    }
    assert list(found["belief_state"]) == ["belief_state/state_1", "belief_state/state_4"]
    for name, estimate in found["linear_probe"].items():
        hits = float(estimate.mean) * 32 * (1 if name.startswith("bayes") else 2)
        assert name.startswith("bayes") or hits == pytest.approx(round(hits), abs=1e-4)


@pytest.mark.slow
def test_lines_of_older_versions_are_outdated_only_where_a_sentence_has_no_label():
    partly = settings(lengths_from_one(length=4, tasks=(4,)))
    fully = settings(lengths_from_one(length=4, tasks=(1,)))
    assert all("sentences" in chosen for chosen in partly.values())
    assert not any("sentences" in chosen for chosen in fully.values())


@pytest.mark.slow
def test_official_labels_and_belief_states_have_sentences_of_their_own():
    config = ConfigDict(lengths_from_one(length=4, tasks=(1,)))
    config.language.name, config.language.pcfg.tasks = "pcfg", ((0, 4),)
    config.probes.labelings = ("official",)
    config = FrozenConfigDict(config)
    official, belief = probe_sets(config.language, config.probes, seed=0)
    assert (belief.names, belief.exact.names) == ([], ["span_0_4"])
    assert (official.names, official.exact.names) == (["span_0_4.official"], [])
    assert official.test[2].all()
    found = dict(
        measure(config, Folder(Path("no")), Checkpoint(0), settings(config), PartialResults())
    )
    assert list(found["belief_state"]) == ["belief_state/span_0_4"]
    assert "linear_probe/span_0_4.official/16" in found["linear_probe"]

"""The words follow the numbers: an effect, none and its reverse differ only in the verdict."""

import pytest

from jaxflat.analysis.flatness_columns import PARAMETRISATION
from jaxflat.analysis.page.findings import summary_sentences

FLATTER, SHARPER = {"log_trace": -0.3}, {"log_trace": 0.3}
BETTER, WORSE = {"accuracy": 1.5}, {"accuracy": -1.5}


def counts(accuracy, flatness, relation):
    more, less, undecided = accuracy
    flatter, sharper, unsure = flatness
    together, apart, unknown = relation
    return (
        f"more accurate in {more}, less accurate in {less}, undecided in {undecided}",
        f"flatter in {flatter}, sharper in {sharper}, undecided in {unsure}",
        f"The flatter model is the more accurate in {together}, the less accurate in {apart}, "
        f"undecided in {unknown}",
    )


@pytest.mark.parametrize(
    ("effects", "accuracy", "flatness", "relation"),
    [
        (BETTER | FLATTER, (3, 0, 0), (3, 0, 0), (3, 0, 0)),
        (WORSE | SHARPER, (0, 3, 0), (0, 3, 0), (3, 0, 0)),
        (WORSE | FLATTER, (0, 3, 0), (3, 0, 0), (0, 3, 0)),
        (BETTER | SHARPER, (3, 0, 0), (0, 3, 0), (0, 3, 0)),
        ({}, (0, 0, 3), (0, 0, 3), (0, 0, 3)),
        (BETTER, (3, 0, 0), (0, 0, 3), (0, 0, 3)),
    ],
)
def test_the_headline_counts_each_outcome_and_its_opposite(
    sweep, effects, accuracy, flatness, relation
):
    headline = summary_sentences(sweep(**effects))[0]
    assert "3 are matched" in headline
    for part in counts(accuracy, flatness, relation):
        assert part in headline


def test_a_result_and_its_reverse_differ_in_the_verdict_words_only(sweep):
    def words(**effects):
        sentence = summary_sentences(sweep(**effects))[1]
        return [word for word in sentence.replace(",", "").split() if word.isalpha()]

    effect, reverse = words(**BETTER | FLATTER), words(**WORSE | SHARPER)
    swap = {"higher": "lower", "flatter": "sharper"}
    verdict = effect.index("Here")
    assert [swap.get(word, word) for word in effect[:verdict]] == reverse[:verdict]
    assert effect[verdict:] == reverse[verdict:]


def test_unmatched_sizes_get_no_verdict(sweep):
    sentences = summary_sentences(sweep(excess=0.02, steps=(1000,), **BETTER | FLATTER))
    assert "none is matched" in sentences[0]
    assert all("no verdict is given" in sentence for sentence in sentences[1:4])
    assert "The flatter model is" not in sentences[0]


def test_one_seed_is_said_and_no_nan_printed(sweep):
    text = " ".join(summary_sentences(sweep(seeds=1, **BETTER)))
    assert "more than one seed" in text
    assert "nan" not in text


def test_two_sizes_two_seeds_one_checkpoint(sweep):
    sentences = summary_sentences(sweep(seeds=2, widths=(8, 16), steps=(100,)))
    assert "1 pair of sizes" in sentences[0]
    assert "nan" not in " ".join(sentences)


def test_lookup_tables_are_set_beside_the_models_where_there_are_any(sweep):
    assert "(lookup table log p)" in " ".join(summary_sentences(sweep()))
    assert "lookup" not in " ".join(summary_sentences(sweep(lookup_tables=False)))


@pytest.mark.parametrize("effects", [BETTER | FLATTER, WORSE | FLATTER, BETTER | SHARPER, {}])
def test_beside_any_result_on_sizes_the_parametrisation_is_called_a_choice(sweep, effects):
    sentences = summary_sentences(sweep(**effects))
    assert sentences.count(PARAMETRISATION) == 1
    assert sum("one parametrisation, which is a choice" in sentence for sentence in sentences) == 1
    assert "dissociate" not in " ".join(sentences)

"""The words follow the numbers: an effect, none and its reverse differ only in the verdict."""

import json

import pytest

from jaxflat.analysis.comparison import matched_pairs, read_comparison
from jaxflat.analysis.page.findings import MAX_LINES, console_lines
from jaxflat.analysis.page.tables import pairs_table
from jaxflat.analysis.verdicts import CONTRADICTED, NONE, SUPPORTED, UNDECIDED, Verdict
from tests.support.reports import lines_of, table_of

FLATTER, SHARPER = {"log_trace": -0.3}, {"log_trace": 0.3}
BETTER, WORSE = {"accuracy": 1.5}, {"accuracy": -1.5}
ACCURATE = "At equal excess loss the larger model is the more accurate: "
FLAT = "At equal excess loss the larger model is the flatter: "


def declare(workdir, primary):
    """Add to the sweep's record that its claims of the kind `primary` are the primary ones."""
    path = workdir / "sweep.json"
    claims = {"primary": primary, "probe": "linear_probe", "shots": 0}
    claims |= {"loss_margin": 0.1, "negligible_slope": 0.5}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trains": {"claims": claims}}))
    return workdir


def only(sentences, words):
    (found,) = [sentence for sentence in sentences if words in sentence]
    return found


@pytest.mark.parametrize(
    ("effects", "accurate", "flat"),
    [
        (BETTER | FLATTER, SUPPORTED, SUPPORTED),
        (WORSE | SHARPER, CONTRADICTED, CONTRADICTED),
        (WORSE | FLATTER, CONTRADICTED, SUPPORTED),
        (BETTER | SHARPER, SUPPORTED, CONTRADICTED),
        ({}, UNDECIDED, UNDECIDED),
        (BETTER, SUPPORTED, UNDECIDED),
    ],
)
def test_the_lines_say_each_outcome_and_its_opposite(sweep, effects, accurate, flat):
    folder = sweep(**effects)
    assert len(matched_pairs(read_comparison(folder))) == 3
    for claim, answer in ((ACCURATE, accurate), (FLAT, flat)):
        assert only(lines_of(folder), claim).startswith(f"{claim}{answer} (")


def test_a_result_and_its_reverse_differ_in_the_verdict_words_only(sweep):
    def words(**effects):
        lines = lines_of(sweep(**effects))
        text = " ".join([only(lines, ACCURATE), only(lines, FLAT)])
        return [word for word in text.replace(",", "").split() if word.isalpha()]

    effect, reverse = words(**BETTER | FLATTER), words(**WORSE | SHARPER)
    assert SUPPORTED in effect
    assert [CONTRADICTED if word == SUPPORTED else word for word in effect] == reverse


def test_the_primary_claim_comes_first(sweep):
    lines = lines_of(declare(sweep(**BETTER), "flatness"))
    assert lines[0].startswith(f"{FLAT[:-2]} (primary): ")
    assert sum("(primary)" in one for one in lines) == 1
    assert not sum("(primary)" in one for one in lines_of(sweep(**BETTER)))


def test_unmatched_sizes_get_no_verdict(sweep):
    folder = sweep(excess=0.02, steps=(1000,), **BETTER | FLATTER)
    comparison = read_comparison(folder)
    assert matched_pairs(comparison) == []
    (row,) = [row for row in pairs_table(comparison.pairs) if row[0].endswith("of 1.1?")]
    assert len(row) == 1 + 3
    assert all(text.startswith("no, p ") for text in row[1:])
    line = only(lines_of(folder), FLAT[:-2])
    assert line.startswith(f"{NONE.capitalize()}, because no pair is matched")


def test_one_seed_is_said_and_no_nan_printed(sweep):
    text = " ".join(lines_of(sweep(seeds=1, **BETTER)))
    assert "because one seed gives no interval: " in text
    assert "nan" not in text


def test_two_sizes_two_seeds_one_checkpoint(sweep):
    folder = sweep(seeds=2, widths=(8, 16), steps=(100,))
    assert len(read_comparison(folder).pairs) == 1
    assert "nan" not in " ".join(lines_of(folder))


def test_lookup_tables_are_set_beside_the_models_where_there_are_any(sweep):
    names = [row[0] for row in table_of(sweep())]
    assert names[-2:] == ["lookup p", "lookup log p"]
    assert not [row for row in table_of(sweep(lookup_tables=False)) if "lookup" in row[0]]


@pytest.mark.parametrize("effects", [BETTER | FLATTER, WORSE | FLATTER, BETTER | SHARPER, {}])
def test_beside_any_result_on_sizes_the_parametrisation_is_named(sweep, effects):
    """The embedded trace is one parametrisation of many; no words relate it to accuracy."""
    lines = lines_of(sweep(**effects))
    assert "embedded Hessian trace, larger over smaller" in only(lines, FLAT)
    beside = lines_of(sweep(**effects, log_invariant=0.1))
    assert "invariant Hessian trace, larger over smaller" in only(beside, FLAT)
    assert "by the embedded trace" in only(beside, FLAT)
    assert "dissociate" not in " ".join(lines + beside)


@pytest.mark.parametrize("widths", [(8,), (8, 16), (8, 16, 32, 64)])
@pytest.mark.parametrize("effects", [BETTER | FLATTER, {}])
def test_the_console_has_a_line_a_verdict_and_few_lines(sweep, effects, widths):
    folder = sweep(**effects, widths=widths)
    lines = lines_of(declare(folder, "flatness"))
    assert 1 <= len(lines) <= MAX_LINES == 8
    assert not [line for line in lines if "\n" in line]
    if len(widths) > 1:
        assert lines[0].startswith(f"{FLAT[:-2]} (primary): ")
        assert sum(line.startswith(ACCURATE) for line in lines) == 1


def test_more_than_eight_findings_are_counted(sweep):
    verdicts = [
        Verdict(
            f"claim {number}",
            "effect",
            False,
            "slope; of seeds",
            "1 (0 to 2)",
            UNDECIDED,
            0.5,
            over="of seeds",
        )
        for number in range(12)
    ]
    lines = console_lines(read_comparison(sweep()), verdicts)
    shown = [
        f"claim {number}: undecided (slope: 1 (0 to 2))." for number in (0, 1, 2, 3, 9, 10, 11)
    ]
    assert lines == [*shown[:4], "The report has 5 more findings.", *shown[4:]]

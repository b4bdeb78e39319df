"""The tables of the page and of the terminal, as rows of text with the header first."""

from collections.abc import Callable

import numpy as np

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.flatness_columns import COMPARED, SHARPNESS, own_measures
from jaxflat.analysis.loss_scale import LossScale
from jaxflat.analysis.page import wording
from jaxflat.analysis.pairs import Pair, is_accuracy
from jaxflat.analysis.results_csv import (
    GIVEN_ACCURACY,
    LATENT_ACCURACY,
    LATENT_CEILING,
    MAP_ACCURACY,
)
from jaxflat.analysis.statistics.intervals import standard_error

Table = list[list[str]]


KINDS = (
    (", embedded, invariant", "@embedded_invariant"),
    (", embedded", "@embedded"),
    ("", ""),
    (", invariant", "@invariant"),
)
COLUMNS = (
    *(
        (f"{name}{suffix}", f"{column}{at}", "", 1.0)
        for column, name in SHARPNESS.items()
        for suffix, at in KINDS
    ),
    ("Accuracy, map (%)", MAP_ACCURACY, ".1f", 100.0),
    ("Accuracy, latent (%)", LATENT_ACCURACY, ".1f", 100.0),
    ("Accuracy, given (%)", GIVEN_ACCURACY, ".1f", 100.0),
    ("Latent ceiling (%)", LATENT_CEILING, ".1f", 100.0),
)


INVARIANT_TRACE, EMBEDDED_TRACE = "Trace,\ninvariant", "Trace,\nembedded"
SUMMARY = {
    INVARIANT_TRACE: COLUMNS[0],
    EMBEDDED_TRACE: COLUMNS[1],
    "Accuracy,\nmap (%)": COLUMNS[-4],
    "Accuracy,\nlatent (%)": COLUMNS[-3],
    "Accuracy,\ngiven (%)": COLUMNS[-2],
}


def summary_table(comparison: Comparison) -> Table:
    """Return the table that the command prints last (80 columns): mean ± half-width over seeds."""
    cells = comparison.cells + comparison.controls
    scale = comparison.scale
    specs = {scale.label.replace(" (", "\n("): _loss_column(scale)} | SUMMARY
    measured = {
        name: spec for name, spec in specs.items() if any(cell.interval(spec[1]) for cell in cells)
    }
    if INVARIANT_TRACE in measured:  # one trace fits in 80 columns
        measured.pop(EMBEDDED_TRACE, None)
    rows = [
        [
            cell.arm.replace("lookup table", "lookup"),
            *_about(cell)[2:3],
            *_numbers(cell, list(measured.values())),
        ]
        for cell in cells
    ]
    return [["Model", "Step", *measured], *rows]


def results_table(comparison: Comparison) -> Table:
    cells = comparison.cells + comparison.controls
    own = own_measures(name for cell in cells for row in cell.rows.values() for name in row.values)
    specs = [_loss_column(comparison.scale), *COLUMNS[:-4]]
    specs += [*((name, column, "", 1.0) for column, name in own.items())]
    columns = [s for s in (*specs, *COLUMNS[-4:]) if any(cell.interval(s[1]) for cell in cells)]
    header = ["Model", "Parameters", "Step", "Seeds", *(spec[0] for spec in columns)]
    return [header, *([*_about(cell), *_numbers(cell, columns)] for cell in cells)]


def pairs_table(pairs: list[Pair]) -> Table:
    """Return one column per pair, which fits a phone."""
    rows: Table = [["", *(f"{pair.first.arm} → {pair.second.arm}" for pair in pairs)]]

    def add(name: str, texts: list[str]) -> None:
        rows.append([name, *texts])

    add("Steps", [f"{pair.first.step:,}, {pair.second.step:,}" for pair in pairs])
    add("Paired seeds", [str(pair.excess.count) for pair in pairs])
    scale = pairs[0].scale
    sampled = "sentences" if scale.is_log else "documents"
    for name, number in (
        (scale.label, lambda cell: cell.mean(scale.column)),
        (f"SEM over {sampled}, one run", lambda cell: cell.mean(f"{scale.column}_sem")),
        ("SEM over seeds", _sem_over_seeds),
    ):
        add(name, [_both(pair, number) for pair in pairs])
    if scale.is_log:
        add("Ratio of excess losses", [_loss_ratio(pair) for pair in pairs])
    else:
        add("Difference of losses (nats)", [wording.nats(pair.excess) for pair in pairs])
        add("Its SEM over documents, paired", [_number(pair.document_error) for pair in pairs])
    if not all(pair.is_read_at_one_loss for pair in pairs):
        for place, test in enumerate(pairs[0].equivalences):
            name = f"Equal within {scale.margin_words(test.margin)}?"
            add(name, [_equal(pair, place) for pair in pairs])
    add("Accuracy (points)", [wording.points(pair.accuracy) for pair in pairs])
    add("Scatter from examples", [_from_examples(pair) for pair in pairs])
    for column, name in COMPARED.items():
        if any(column in pair.flatness for pair in pairs):
            add(f"{name} ratio", [wording.ratio(pair.flatness.get(column)) for pair in pairs])
    return rows


def secondary_table(pairs: list[Pair]) -> Table:
    """Return second minus first, in points, for every task, labeling and number of shots."""
    names = list(dict.fromkeys(name for pair in pairs for name in pair.secondary))
    header = ["Second minus first, points"]
    header += [f"{pair.first.arm} → {pair.second.arm}" for pair in pairs]
    return [header] + [
        [_endpoint(name), *(wording.points(pair.secondary.get(name)) for pair in pairs)]
        for name in names
    ]


def endpoints_table(comparison: Comparison) -> Table:
    """Return accuracy by task, labeling and shots at every cell, beside its Bayes ceiling."""
    cells = [*comparison.cells, *comparison.controls]
    values = {name for cell in cells for row in cell.rows.values() for name in row.values}
    names = sorted(name for name in values if is_accuracy(name))
    header = [
        "Accuracy (%)",
        "Bayes ceiling",
        *(f"{cell.arm}, {cell.step:,}" for cell in cells),
    ]
    return [header] + [
        [_endpoint(name), _ceiling(cells, name)]
        + [wording.plus_minus(cell, name, ".1f", 100) for cell in cells]
        for name in names
    ]


def _about(cell: Cell) -> list[str]:
    size = wording.MISSING if np.isnan(cell.num_params) else wording.params(cell.num_params)
    step = f"{cell.step:,}" if cell.step else wording.MISSING
    return [cell.arm, size, step, str(len(cell.rows))]


def _numbers(cell: Cell, columns: list[tuple[str, str, str, float]]) -> list[str]:
    return [wording.plus_minus(cell, column, style, scale) for _, column, style, scale in columns]


def _both(pair: Pair, number: Callable[[Cell], float]) -> str:
    found = number(pair.first), number(pair.second)
    return ", ".join(map(_number, found))


def _number(value: float | None) -> str:
    if value is None or np.isnan(value):
        return wording.MISSING
    text = f"{value:.4f}"
    return text if float(text) or not value else f"{value:.1g}"


def _loss_column(scale: LossScale) -> tuple[str, str, str, float]:
    return (scale.label, scale.column, ".4f", 1.0)


def _sem_over_seeds(cell: Cell) -> float:
    error = standard_error(list(cell.by_seed(cell.scale.column).values()))
    return np.nan if error is None else error


def _loss_ratio(pair: Pair) -> str:
    return "read at one loss" if pair.interpolated else wording.ratio(pair.excess_ratio)


def _equal(pair: Pair, place: int) -> str:
    if pair.is_read_at_one_loss:
        return wording.MISSING
    test = pair.equivalences[place]
    chosen = f" (× {pair.candidates} candidates)" if pair.candidates > 1 else ""
    return f"{'yes' if test.holds else 'no'}, p {wording.p_value(test.p)}{chosen}"


def _from_examples(pair: Pair) -> str:
    if pair.split is None or pair.split.share is None:
        return wording.MISSING
    return f"at most {pair.split.share:.0%}"


def _endpoint(column: str) -> str:
    """'linear_probe/state_3.map/4000' -> 'linear probe, state 3, map, 4000 shots'."""
    kind, _, rest = column.partition("/")
    task, _, shots = rest.partition("/")
    name = f"{kind}, {task.replace('.', ', ')}".replace("_", " ")
    return f"{name}, {int(shots):,} shots" if shots.isdigit() else name


def _ceiling(cells: list[Cell], column: str) -> str:
    bayes = "bayes/" + column.split("/")[1]
    known = [cell.mean(bayes) for cell in cells if cell.interval(bayes)]
    return f"{100 * sum(known) / len(known):.1f}" if known else wording.MISSING

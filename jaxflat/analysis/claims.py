"""Judge the claims that a sweep can test, each by statistics over seeds."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxflat.analysis.arms import ArmComparison
from jaxflat.analysis.associations import GIVEN_LOSS, SPEARMAN, Association, associations
from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.flatness_columns import EMBEDDED
from jaxflat.analysis.label_noise import noise_verdict
from jaxflat.analysis.page import wording
from jaxflat.analysis.pairs import Pair
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY, Row
from jaxflat.analysis.statistics.intervals import Interval, log_ratio_interval, mean_interval
from jaxflat.analysis.verdicts import NONE, Verdict, decide

ONE_SEED = "one seed gives no interval"
ALL_CHECKPOINTS = "Over all checkpoints, flatter models tend to be more accurate"
GIVEN = ", given the excess loss"


def judge(comparison: Comparison, found: Sequence[Association] | None = None) -> list[Verdict]:
    """Return a verdict on every claim that the sweep's design can test."""
    found = associations(comparison) if found is None else found
    noise = noise_verdict(comparison)
    on_pairs = (
        _on_arms(comparison.arm_comparison) if comparison.arm_comparison else _on_sizes(comparison)
    )
    return on_pairs + _on_all_checkpoints(found) + ([noise] if noise else [])


def _on_sizes(comparison: Comparison) -> list[Verdict]:
    why = _no_pair(comparison.pairs, comparison.obstacle or "no two sizes share a seed")
    larger = "the larger model"
    return [*_on_second(comparison.pairs, larger, why), _on_flatter(comparison.pairs, why)]


def _on_arms(found: ArmComparison) -> list[Verdict]:
    """Judge each arm against the baseline, then all pairs of arms."""
    verdicts = []
    for pair in found.against:
        why = _no_pair([pair], "they share no seed")
        verdicts += _on_second([pair], pair.second.arm, why, f" than {pair.first.arm}")
    return [*verdicts, _on_flatter(found.pairs, _no_pair(found.pairs, ""))]


def _on_second(pairs: Sequence[Pair], second: str, why: str, than: str = "") -> list[Verdict]:
    """Judge whether the second model of the pairs is more accurate, and whether it is flatter."""
    matched = [pair for pair in pairs if pair.equivalence.holds]
    column, sharpness = _common_column(matched)
    larger, smaller, article = (second, "the other", "") if than else ("larger", "smaller", "the ")
    return [
        _judged(
            f"At matched excess loss {second} is {article}more accurate{than}",
            f"accuracy, {larger} minus {smaller}, points",
            (matched, why),
            lambda: _more_accurate(matched),
        ),
        _judged(
            f"At matched excess loss {second} is {article}flatter{than}",
            f"{sharpness}, {larger} over {smaller}",
            (matched, why),
            lambda: _beside_invariant(_flatter, matched, column),
        ),
    ]


def _on_flatter(pairs: Sequence[Pair], why: str) -> Verdict:
    """Judge the mean over pairs; also count the outcomes, since one pair may dominate the mean."""
    matched = [pair for pair in pairs if pair.equivalence.holds]
    column, sharpness = _common_column(matched)
    relations = [pair.relation for pair in matched]
    more, less = relations.count(1), relations.count(-1)
    counts = f"pair by pair: the flatter is more accurate in {more}, less accurate in {less}"
    return _judged(
        "At matched excess loss the flatter model is the more accurate",
        f"accuracy, flatter minus sharper (by {sharpness}), points ({counts})",
        (matched, why),
        lambda: _beside_invariant(_flatter_more_accurate, matched, column),
    )


def _judged(
    claim: str,
    statistic: str,
    on: tuple[list[Pair], str],
    judged: Callable[[], tuple[str, Interval | None, str]],
) -> Verdict:
    """`on` holds the matched pairs and, if there are none, the reason."""
    matched, why = on
    if not matched:
        return Verdict(claim, "", "", NONE, why)
    answer, interval, evidence = judged()
    if not interval:
        why = "a measurement is missing, or the flatness measure is not positive"
    else:
        why = ONE_SEED if answer == NONE else ""
    over = f"mean over {wording.plural(len(matched), 'matched pair')}"
    return Verdict(claim, f"{statistic}; {over}", evidence, answer, why)


def _common_column(matched: Sequence[Pair]) -> tuple[str, str]:
    """Return the first flatness measure that every pair has, and its name."""
    column = next((name for name in EMBEDDED if all(name in p.flatness for p in matched)), "")
    return column, EMBEDDED.get(column, "flatness")


Judge = Callable[[list[Pair], str], tuple[str, Interval | None, str]]


def _beside_invariant(
    judge: Judge, pairs: list[Pair], column: str
) -> tuple[str, Interval | None, str]:
    """Judge by an embedded trace, and add what the trace that no rescaling changes would say."""
    answer, interval, evidence = judge(pairs, column)
    invariant = f"{column}_invariant"
    if all(invariant in pair.flatness for pair in pairs):
        other, _, value = judge(pairs, invariant)
        otherwise = "" if other == answer else f", {other}"
        evidence += f"; by the invariant trace {value}{otherwise}"
    return answer, interval, evidence


def _more_accurate(pairs: list[Pair]) -> tuple[str, Interval | None, str]:
    interval = _over_seeds(
        pairs, lambda small, large: large[PRIMARY_ACCURACY] - small[PRIMARY_ACCURACY], ()
    )
    return decide(interval, 0.0, +1), interval, wording.points(interval)


def _flatter(pairs: list[Pair], column: str) -> tuple[str, Interval | None, str]:
    """Judge the geometric mean of the pairs' ratios."""
    rows = [row for p in pairs for c in (p.first, p.second) for row in c.rows.values()]
    if not column or min((row.values.get(column, 1.0) for row in rows), default=0.0) <= 0:
        return NONE, None, wording.MISSING
    logs = _seed_means(pairs, lambda a, b: float(np.log(b[column] / a[column])), (column,))
    ratio = log_ratio_interval([1.0] * len(logs), np.exp(logs).tolist()) if logs else None
    return decide(ratio, 1.0, -1), ratio, wording.ratio(ratio)


def _flatter_more_accurate(pairs: list[Pair], column: str) -> tuple[str, Interval | None, str]:
    """Each seed decides separately which model of a pair is the flatter."""
    if not column:
        return NONE, None, wording.MISSING

    def advantage(small: dict[str, float], large: dict[str, float]) -> float:
        flatter = -np.sign(large[column] - small[column])
        return float(flatter * (large[PRIMARY_ACCURACY] - small[PRIMARY_ACCURACY]))

    interval = _over_seeds(pairs, advantage, (column,))
    return decide(interval, 0.0, +1), interval, wording.points(interval)


Values = Callable[[dict[str, float], dict[str, float]], float]


def _over_seeds(pairs: list[Pair], value: Values, columns: Sequence[str]) -> Interval | None:
    means = _seed_means(pairs, value, (PRIMARY_ACCURACY, *columns))
    return mean_interval(means) if means else None


def _seed_means(pairs: list[Pair], value: Values, columns: Sequence[str]) -> list[float]:
    """Return the mean over pairs, for each seed that has every column in every pair."""

    def complete(row: Row | None) -> bool:
        return row is not None and all(name in row.values for name in columns)

    cells = [cell for pair in pairs for cell in (pair.first, pair.second)]
    seeds = [s for s in cells[0].rows if all(complete(cell.rows.get(s)) for cell in cells)]
    return [
        float(np.mean([value(p.first.rows[s].values, p.second.rows[s].values) for p in pairs]))
        for s in seeds
    ]


def _no_pair(pairs: Sequence[Pair], without: str) -> str:
    """Return why no pair is matched; `without` is the reason if there are no pairs."""
    if not pairs:
        return without
    if all(pair.excess.low is None for pair in pairs):
        return ONE_SEED
    return "no pair is matched in excess loss"


def _on_all_checkpoints(found: Sequence[Association]) -> list[Verdict]:
    """Judge by the first flatness measure that was measured, regardless of its result."""
    one = next((one for one in found if one.column in EMBEDDED), None)
    claims = {SPEARMAN: ALL_CHECKPOINTS, GIVEN_LOSS: ALL_CHECKPOINTS + GIVEN}
    if one is None:
        why = "no seed has accuracy, excess loss and an @embedded measure at every checkpoint"
        return [Verdict(claim, "", "", NONE, why) for claim in claims.values()]
    verdicts = []
    for name, claim in claims.items():
        interval = one.found.get(name)
        answer = decide(interval, 0.0, -1)
        why = one.missing.get(name) or (ONE_SEED if answer == NONE else "")
        seeds = f"{interval.count if interval else 0} of {wording.plural(one.num_seeds, 'seed')}"
        statistic = f"{name}, accuracy with {one.name}; {seeds}"
        verdicts.append(Verdict(claim, statistic, wording.correlation(interval), answer, why))
    return verdicts

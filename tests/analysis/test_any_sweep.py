"""Every sweep has a page, and its answer stays short."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest

from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import read_comparison
from jaxflat.analysis.page import explorer, figures
from jaxflat.analysis.page.headline import MOST_WORDS, headline
from tests.analysis.conftest import write_rows
from tests.support.counts import FULL
from tests.support.pages import read_page
from tests.support.reports import report_of

KEYS = {
    "model.width": (8, 16, 32),
    "phases.pretrain.schedule.learning_rate": (1e-3, 3e-3, "auto"),
    "phases.pretrain.optimizer.name": ("adamw", "sam"),
    "phases.pretrain.optimizer.sam.radius": (0.05, 0.1),
    "phases.pretrain.flatness_penalty.strength": (0.0, -1e-5, 1e-4),
    "phases.pretrain.targets": ("exact", "sampled"),
    "phase_order": ("('warm', 'a')", "('warm', 'b')", "()"),
    "model.name": ("transformer", "lookup_table"),
    "language.seed": (0, 1),
}
MEASURES = ("hessian_trace", "hessian_trace@embedded", "hessian_trace@embedded_invariant")


@dataclass
class RandomSweep:
    """A chain of products of the values of KEYS, and what its results hold and lack."""

    random: np.random.Generator
    arms: list[dict] = field(default_factory=list)

    def __post_init__(self):
        for _ in range(self.random.integers(1, 3)):
            keys = self.random.choice(list(KEYS), self.random.integers(0, 4), replace=False)
            product = [{}]
            for key in keys:
                values = KEYS[key][: self.random.integers(1, len(KEYS[key]) + 1)]
                product = [{**arm, key: value} for arm in product for value in values]
            self.arms += product[:8]

    def is_so(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def rows(self) -> list[dict]:
        """Return rows of results.csv; points may have failed, and columns be absent or constant."""
        columns = [f"linear_probe/{t}.{self.random.choice(['map', 'given'])}/200" for t in "ab"]
        columns += [f"linear_probe/a.map/{4000}"] * self.is_so(0.5)
        measures = MEASURES[: self.random.integers(0, 4)]
        steps = [1000, 2000, 4000][: self.random.integers(1, 4)]
        seeds, failed = self.random.integers(1, 6), self.random.choice([0.0, 0.2, 0.7])
        unmatched, constant = self.is_so(0.4), self.is_so(0.2)
        swept = list(dict.fromkeys(key for arm in self.arms for key in arm))
        rows = []
        for place, arm in enumerate(self.arms):
            for seed in range(seeds):
                if self.is_so(failed):
                    continue
                untrained = (
                    arm.get("phase_order") == "()" or arm.get("model.name") == "lookup_table"
                )
                for step in [0] if untrained else steps:
                    noise = 1.0 if constant else float(np.exp(self.random.normal(0, 0.1)))
                    excess = 0.01 * (step + 1) ** -0.1 * noise * (1 + place * unmatched)
                    row = {"point": f"{place},{seed}"} | {key: arm.get(key, "") for key in swept}
                    row |= {"seed": seed, "step": step, "projected": int(self.is_so(0.1))}
                    row |= {"last": int(step == steps[-1]), "excess_loss": excess}
                    row |= {"num_params": 60 * arm.get("model.width", 16) ** 2, "loss": 2.5}
                    row |= {name: 40 * noise * (1 - 2 * self.is_so(0.01)) for name in measures}
                    row |= {name: min(1.0, 0.9 * noise) for name in columns}
                    row |= {name: "" for name in row if self.is_so(0.02) and "/" in name}
                    rows.append(row)
        return rows

    def claims(self) -> dict:
        primary = str(self.random.choice(["accuracy", "flatness", "effect", "label noise"]))
        return {
            **{"primary": primary, "probe": "linear_probe"},
            "shots": int(self.random.choice([0, 200, 7])),
            **{"loss_margin": float(self.random.choice([0.1, 0.5])), "negligible_slope": 0.5},
        }


SLOW = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 200 if FULL else 20)]


@pytest.mark.parametrize("seed", [*range(5), *SLOW])
def test_any_sweep_has_a_page(tmp_path, monkeypatch, seed):
    """Figures are drawn, and rendered in one sweep of twenty."""
    if seed % 20:
        monkeypatch.setattr(figures, "render", lambda *_, **__: b"")
        monkeypatch.setattr(explorer, "runtime", lambda: "")
    sweep = RandomSweep(np.random.default_rng(seed))
    rows = sweep.rows()
    if rows:
        write_rows(tmp_path / "results.csv", rows)
    if sweep.is_so(0.8):
        record = {"points": [], "trains": {"claims": sweep.claims()}}
        (tmp_path / "sweep.json").write_text(json.dumps(record))
    page = read_page(report_of(tmp_path))
    comparison = read_comparison(tmp_path)
    words = headline(comparison, judge(comparison))
    assert words.answer in page.visible
    assert len(words.answer.split()) <= MOST_WORDS
    assert ("records no claims" in page.visible) == (comparison.plan.primary == "")

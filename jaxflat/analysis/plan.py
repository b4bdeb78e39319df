"""What a sweep declared before it ran: its primary claim, and the margins of its verdicts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Plan:
    """The section `claims` of a sweep's config, which sweep.json records.

    primary: the kind of the primary claim, "" if none was declared. probe, shots: the measure of
    accuracy, and its number of labelled sentences, 0 for the most that were measured.
    loss_margin: see `loss_ratio`. loss_margin_nats: two held-out losses of a text are equal if
    their difference is shown to lie within it. negligible_slope: points of accuracy per halving of
    the trace; an effect within this margin is negligible. penalties: what the flatness penalty of
    each phase measures in the config that the points share, by its key.
    """

    primary: str
    probe: str
    shots: int
    loss_margin: float
    loss_margin_nats: float
    negligible_slope: float
    penalties: Mapping[str, str] = field(default_factory=dict)

    @property
    def accuracy(self) -> str:
        """Name the measure of accuracy."""
        shots = f"{self.shots:,}" if self.shots else "the most"
        return f"{self.probe.replace('_', ' ')}, {shots} labelled sentences"

    @property
    def loss_ratio(self) -> float:
        """Two excess losses are equal if their ratio is shown to lie within 1 / this and this."""
        return 1 + self.loss_margin


UNDECLARED = Plan(
    primary="",
    probe="linear_probe",
    shots=0,
    loss_margin=0.1,
    loss_margin_nats=0.01,
    negligible_slope=0.5,
)
"""The plan of folders that older versions wrote: no claim is the primary one."""


def read_plan(workdir: Path) -> Plan:
    """Return the plan in workdir/sweep.json; UNDECLARED if it records none."""
    path = Path(workdir) / "sweep.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    trains = record.get("trains", {})
    penalties = {
        f"phases.{name}.flatness_penalty.measure": phase["flatness_penalty"]["measure"]
        for name, phase in trains.get("phases", {}).items()
        if "flatness_penalty" in phase
    }
    return replace(UNDECLARED, **trains.get("claims", {}), penalties=penalties)

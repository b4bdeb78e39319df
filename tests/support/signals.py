"""Signals that come in the compiled calls of a run."""

import signal

from jaxflat.distributed import preemption
from jaxflat.flatness import measures
from jaxflat.runs import measure_finetuning, measure_loss, measure_probes, slots

COMPILED = (
    (slots, "run_calls"),
    (measure_loss, "_losses"),
    (measures, "hessian_trace_terms"),
    (measures, "fisher_trace_terms"),
    (measures, "gauss_newton_trace_samples"),
    (measure_probes, "_linear_accuracies"),
    (measure_probes, "belief_state_determinations"),
    (measure_finetuning, "_correct"),
)


def signal_in(monkeypatch, work, every=1):
    """Let a signal come in every so many calls of these functions; return the calls."""
    calls = []

    def follow(module, name):
        function = getattr(module, name)

        def wrapper(*args, **kwargs):
            calls.append(name)
            if every and len(calls) % every == 0:
                preemption._received.append(signal.SIGTERM)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)

    for module, name in work:
        follow(module, name)
    return calls


def until_done(work) -> int:
    """Do the work again until no signal stops it; return how often one did."""
    for stops in range(1000):
        preemption._received.clear()
        try:
            work()
        except preemption.Preempted:
            continue
        return stops
    raise AssertionError("it gets nowhere")

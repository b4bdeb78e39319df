"""The remaining time on a fake clock, whole lines in files, and warnings as plain lines."""

import re
import warnings

import pytest
from rich import box
from rich.table import Table

from jaxflat.console import (
    Display,
    Kind,
    PointTime,
    estimate_remaining,
    make_console,
    plain_warnings,
    point_kind,
)
from jaxflat.distributed import ranks
from jaxflat.languages.grammars.grammar_file import GrammarWarning


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("rich.console.monotonic", lambda: now[0])
    return now


def etas(output):
    """Return the estimates of the lines that have one, in seconds."""
    found = re.findall(r"ETA (\d+):(\d\d):(\d\d)\)", output)
    return [
        3600 * int(hours) + 60 * int(minutes) + int(seconds) for hours, minutes, seconds in found
    ]


def test_remaining_points_take_as_long_as_finished_ones(clock, capsys):
    with Display(4) as display:
        for number in range(4):
            clock[0] += 10
            display.finish_point(f"point {number}", "excess 0.1")
    output = capsys.readouterr().out
    assert etas(output) == [30, 20, 10, 0]
    assert "[2/4] point 1: excess 0.1 (ETA 0:00:20)" in output


def test_points_finished_earlier_do_not_count_in_the_estimate(clock, capsys):
    with Display(5, {"a", "c"}) as display:
        display.finish_point("a", "")
        clock[0] += 10
        display.finish_point("b", "")
        display.finish_point("c", "")
        clock[0] += 20
        display.finish_point("d", "")
    output = capsys.readouterr().out
    assert etas(output) == [20, 15]
    assert "[1/5] a: \n" in output
    assert "[3/5] c: \n" in output


def test_time_spent_on_points_trained_together_counts_for_each(clock, capsys):
    names = ["a", "b", "c", "d"]
    with Display(4) as display:
        clock[0] += 40
        for name in names:
            display.add_seconds(name, 10)
        for name in names:
            clock[0] += 5
            display.finish_point(name, "")
    assert etas(capsys.readouterr().out) == [15, 10, 5, 0]


def test_preparations_for_all_points_do_not_count_in_the_estimate(clock, capsys):
    with Display(3) as display:
        clock[0] += 3600
        display.finish_preparations()
        for name in ("a", "b", "c"):
            clock[0] += 60
            display.finish_point(name, "")
    assert etas(capsys.readouterr().out) == [120, 60, 0]


def test_points_take_as_long_as_others_of_their_kind_without_compilation(clock, capsys):
    """Two kinds, of 30 and 3 seconds; the first point of each compiles for 60 and 6 more."""
    compiled, kinds = [0.0], {f"{kind}{seed}": Kind(kind) for seed in range(3) for kind in "ab"}
    with Display(6, (), kinds, lambda: compiled[0]) as display:
        for name, seconds, compiling in (
            *(("a0", 90, 60), ("b0", 9, 6), ("a1", 30, 0), ("b1", 3, 0)),
            *(("a2", 30, 0), ("b2", 3, 0)),
        ):
            clock[0] += seconds
            compiled[0] += compiling
            display.finish_point(name, "")
    # After a0 nothing is known of b but that it is compiled once, too.
    assert etas(capsys.readouterr().out) == [5 * 30 + 60, 66, 36, 33, 3, 0]


def test_compilation_of_points_trained_together_counts_apart(clock, capsys):
    compiled, names = [0.0], ["a", "b", "c", "d"]
    with Display(4, compile_seconds=lambda: compiled[0]) as display:
        clock[0] += 80
        compiled[0] += 40
        for name in names:
            display.add_seconds(name, 20, 10)
        for name in names:
            clock[0] += 5
            display.finish_point(name, "")
    assert etas(capsys.readouterr().out) == [15, 10, 5, 0]


# Seconds of the points of a sweep, three sizes and two lookup tables for each seed, and the part of
# them that went into compilation: measured on two busy cores.
SWEEP = [
    *((110, 79), (68, 34), (56, 15), (8, 5), (4, 1)),
    *((31, 0), (33, 0), (40, 0), (3, 0), (3, 0)),
    *((31, 0), (33, 0), (41, 0), (4, 0), (4, 0)),
    *((34, 0), (32, 0), (41, 0), (3, 0), (3, 0)),
    *((40, 0), (36, 0), (43, 0), (3, 0), (3, 0)),
]


def test_the_estimate_is_within_a_factor_of_2_from_the_second_point_on():
    stages = (7, 7, 7, 2, 2)
    kinds = [Kind(str(number % 5), stages[number % 5]) for number in range(len(SWEEP))]
    finished = [
        PointTime(kind, seconds - compiling, compiling)
        for kind, (seconds, compiling) in zip(kinds, SWEEP, strict=True)
    ]
    for number in range(2, len(SWEEP)):
        left = [(kind, 0.0) for kind in kinds[number:]]
        taken = sum(seconds for seconds, _ in SWEEP[number:])
        assert 1 / 2 < estimate_remaining(finished[:number], left) / taken < 2


def test_a_kind_without_finished_points_takes_the_time_of_its_size():
    finished = [PointTime(Kind("a", 3), 30.0, 0.0), PointTime(Kind("b", 1), 20.0, 0.0)]
    assert estimate_remaining(finished, [(Kind("c", 4), 0.0)]) == 4 * (30 / 3 + 20 / 1) / 2


def test_the_kind_of_a_point_is_its_settings_without_the_seeds():
    settings = {"model.width": 16, "phase_order": ("warm",)}
    seeds = ({"seed": 1}, {"data_seed": 2, "probe_seed": 3}, {"language.seed": 4}, {})
    assert len({point_kind(settings | seed) for seed in seeds}) == 1
    assert point_kind(settings) == point_kind({"phase_order": ["warm"], "model.width": 16})
    assert point_kind(settings) != point_kind(settings | {"model.width": 32})


def test_output_to_a_file_is_neither_cut_nor_wrapped(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes a file for a terminal
    monkeypatch.setenv("COLUMNS", "40")
    console, cells = make_console(), ["x" * 150, "y" * 150]
    table = Table(*cells, box=box.SIMPLE_HEAD)
    table.add_row(*cells)
    console.print(table)
    console.print("word " * 100, highlight=False)
    with Display(1) as display:
        display.start_stage("z" * 100, 1)
    output = capsys.readouterr().out
    assert len(re.findall("x{150}.*y{150}", output)) == 2
    assert "word " * 99 in output
    assert "z" * 100 in output


def test_a_notebook_gets_plain_lines(capsys, monkeypatch):
    """Warnings are errors here: rich's own output to notebooks warns that it needs ipywidgets."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # a kernel sets it
    with Display(1) as display:
        display.finish_point("a", "loss 1")
    output = capsys.readouterr().out
    assert "[1/1] a: loss 1" in output
    assert "\x1b" not in output


def test_no_time_remains_when_all_points_are_finished(clock):
    with Display(1, {"a"}) as display:
        display.finish_point("a", "")
        assert str(display._progress.columns[-1].render(display._progress.tasks[0])) == "0:00:00"


def test_the_bar_counts_down_to_the_same_end(clock):
    with Display(3) as display:
        column = display._progress.columns[-1]
        (sweep, _) = display._progress.tasks
        assert str(column.render(sweep)) == "-:--:--"
        clock[0] += 10
        display.finish_point("a", "")
        clock[0] += 5
        assert str(column.render(sweep)) == "0:00:15"


def warn_twice_each():
    for _ in range(2):
        warnings.warn("a file has a fault", GrammarWarning, stacklevel=1)
        warnings.warn("another package warns", UserWarning, stacklevel=1)


@pytest.mark.parametrize(("rank", "lines"), [(0, "warning: a file has a fault\n"), (1, "")])
def test_a_warning_of_jaxflat_is_one_line_on_rank_0(capsys, monkeypatch, rank, lines):
    monkeypatch.setattr(ranks, "_rank", rank)
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        show_before = warnings.showwarning
        with plain_warnings():
            warn_twice_each()
        assert warnings.showwarning is show_before
    assert capsys.readouterr().err == lines
    assert [str(other.message) for other in others] == ["another package warns"] * 2

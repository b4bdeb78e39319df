"""The remaining time on a fake clock, and warnings as plain lines."""

import re
import warnings

import pytest

from jaxflat.console import Display, plain_warnings
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

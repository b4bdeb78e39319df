"""The lines and events of a training curve."""

import json

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

from jaxflat.storage import curve
from jaxflat.storage.curve import Curve
from tests.support.folders import owned


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(curve.time, "time", lambda: 12.0)


@pytest.fixture
def folder(tmp_path):
    with owned(tmp_path / "run") as folder:
        folder.make()
        yield folder


def lines_of(folder):
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line.get("branch"), line["loss"]) for line in map(json.loads, lines)]


def position(line):
    return line.get("branch", line["step"]), "branch" in line


def test_a_curve_goes_on_where_it_was(folder, clock):
    first_curve = Curve(folder)
    first_curve.add("pretrain", 2, 1.5, None)
    num_bytes = first_curve.num_bytes
    first_curve.add("pretrain", 4, 1.25, None)
    second_curve = Curve(folder, num_bytes, 2, position)
    assert second_curve.num_bytes == num_bytes
    second_curve.add("drift", 6, 0.5, None)
    assert lines_of(folder) == [(2, None, 1.5), (6, None, 0.5)]
    with pytest.raises(ValueError, match=r"metrics\.jsonl: .* its checkpoint recorded 999; cannot"):
        Curve(folder, 999, 2, position)


def test_lines_are_in_the_order_of_their_steps(folder, clock):
    curve = Curve(folder)
    for step, branch in ((4, None), (6, 4), (8, 4), (6, None), (10, 6), (8, None)):
        curve.add("pretrain", step, float(step), branch)
    steps = [(step, branch) for step, branch, _ in lines_of(folder)]
    assert steps == [(4, None), (6, None), (6, 4), (8, None), (8, 4), (10, 6)]


def test_a_resumed_curve_has_the_lines_up_to_its_step_and_of_branches_from_there(folder, clock):
    curve, recorded = Curve(folder), {}
    for step, branch in ((4, None), (8, 4), (6, None), (7, 6), (8, 6), (10, None), (12, 10)):
        curve.add("pretrain", step, float(step), branch)
        recorded[step, branch] = curve.num_bytes
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "pret')  # as an older version left it when killed
    resumed = Curve(folder, recorded[6, None], 6, position)
    assert resumed.has("pretrain", 6, (7, 8))
    assert not resumed.has("pretrain", 6, (7, 8, 9))
    resumed.add("pretrain", 7, 0.0, 6)
    expected = [(4, None, 4.0), (6, None, 6.0), (7, 6, 0.0), (8, 4, 8.0), (8, 6, 8.0)]
    assert lines_of(folder) == expected
    lines = (folder.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder.path / "metrics.jsonl").write_bytes(b"".join([*lines[:1], *lines[2:]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl: the file has .* cannot resume"):
        Curve(folder, recorded[6, None], 6, position)


def test_a_branch_of_an_older_version_leaves_no_line_when_it_trains_again(folder, clock):
    """Older versions wrote anneals before the trunk's next line, and a line every 250 steps."""
    order = ((4, None), (6, 4), (8, 4), (6, None), (11, 6))
    lines = [
        {"phase": "pretrain", **({"branch": branch} if branch else {}), "step": step, "loss": 1.0}
        for step, branch in order
    ]
    folder.make()
    (folder.path / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    num_bytes = sum(len(json.dumps(one)) + 1 for one in lines[:4])
    curve = Curve(folder, num_bytes, 6, position)
    assert not curve.has("pretrain", 6, (9, 12))
    curve.forget("pretrain", 6)
    for step in (9, 12):
        curve.add("pretrain", step, float(step), 6)
    expected = [
        (4, None, 1.0),
        (6, None, 1.0),
        (6, 4, 1.0),
        (8, 4, 1.0),
        (9, 6, 9.0),
        (12, 6, 12.0),
    ]
    assert lines_of(folder) == expected


def test_events_are_as_tensorboardx_writes_them(folder, tmp_path, clock):
    Curve(folder).add("pretrain", 4, 1.25, 2)
    value = {"tag": "loss/pretrain/anneal_2", "simple_value": 1.25}
    writer = RecordWriter(str(tmp_path / "theirs"))
    for content in ({"file_version": "brain.Event:2"}, {"step": 4, "summary": {"value": [value]}}):
        writer.write(Event(wall_time=12.0, **content).SerializeToString())
    writer.close()
    (ours,) = folder.path.glob("events.out.tfevents.12.*")
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()

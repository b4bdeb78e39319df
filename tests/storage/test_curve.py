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


def test_a_curve_goes_on_where_it_was(folder, clock):
    first_curve = Curve(folder, 0)
    first_curve.add("pretrain", 2, 1.5, None)
    num_bytes = first_curve.num_bytes
    first_curve.add("pretrain", 4, 1.25, 2)
    Curve(folder, num_bytes).add("drift", 6, 0.5, None)
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    first, last = (
        {"phase": "pretrain", "step": 2, "loss": 1.5},
        {"phase": "drift", "step": 6, "loss": 0.5},
    )
    assert lines == [first, last]
    with pytest.raises(ValueError, match=r"metrics\.jsonl: .* its checkpoint recorded 999; cannot"):
        Curve(folder, 999)


def test_events_are_as_tensorboardx_writes_them(folder, tmp_path, clock):
    Curve(folder, 0).add("pretrain", 4, 1.25, 2)
    value = {"tag": "loss/pretrain/anneal_2", "simple_value": 1.25}
    writer = RecordWriter(str(tmp_path / "theirs"))
    for content in ({"file_version": "brain.Event:2"}, {"step": 4, "summary": {"value": [value]}}):
        writer.write(Event(wall_time=12.0, **content).SerializeToString())
    writer.close()
    (ours,) = folder.path.glob("events.out.tfevents.12.*")
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()

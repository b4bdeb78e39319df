"""Names of arms are labels: settings identify a point, and renaming an arm trains nothing."""

import json
from pathlib import Path

import pytest

from jaxflat import main
from jaxflat.config import arm, chain, param, product
from jaxflat.config.loading import without_keys
from jaxflat.config.validation import InputError
from jaxflat.storage.leased_folder import Folder
from jaxflat.sweeps.points import expand, select
from jaxflat.sweeps.sweep_record import record_sweep
from tests.support.sweeps import tiny_config

RATE = "phases.drift.schedule.learning_rate"
BATCH = "phases.drift.batch_size"
DEFAULT = 3e-3
SEEDS = param("seed", [0, 1])
ARMS = product(SEEDS, chain(arm("slow", {RATE: 1e-3}), arm("usual", {})))


def record(listed, workdir: Path):
    """Record a sweep in its folder, without running it; return its points."""
    config = tiny_config()
    points = expand(config, listed, workdir)
    record_sweep(config, points, Folder(workdir))
    return points


def names(listed, workdir: Path) -> list[str]:
    return [point.name for point in expand(tiny_config(), listed, workdir)]


def recorded(workdir: Path) -> list[tuple[str, str]]:
    points = json.loads((workdir / "sweep.json").read_text())["points"]
    return [(point["name"], point.get("arm", "")) for point in points]


def test_a_name_is_given_to_each_point_and_joined_in_a_product():
    assert arm("SAM", {"w": 1}) == [{"arm": "SAM", "w": 1}]
    assert arm("SAM", param("w", [1, 2])) == [{"arm": "SAM", "w": 1}, {"arm": "SAM", "w": 2}]
    small, large = arm("small", {"w": 8}), arm("large", {"w": 16})
    both = product(chain(small, large), chain(arm("AdamW", {}), arm("SAM", {"s": 1})))
    assert [point["arm"] for point in both] == [
        *("small, AdamW", "small, SAM", "large, AdamW", "large, SAM")
    ]


def test_a_name_is_no_part_of_a_points_identity(tmp_path):
    unnamed = product(SEEDS, chain([{RATE: 1e-3}], [{}]))
    assert names(ARMS, tmp_path) == names(unnamed, tmp_path)
    points = expand(tiny_config(), ARMS, tmp_path)
    assert [point.arm for point in points] == ["slow", "usual"] * 2
    assert all("arm" not in point.overrides for point in points)


def test_folders_have_the_names_that_earlier_versions_gave_them(tmp_path):
    listed = [{"seed": 0, RATE: DEFAULT}, {"seed": 1, RATE: 1e-3}, {"seed": 0, "phase_order": ()}]
    assert names(listed, tmp_path) == [
        "learning_rate=0.003_seed=0_e1d37a",
        "learning_rate=0.001_seed=1_9f9607",
        "seed=0_ebc739",
    ]


def test_renaming_keeps_every_point_and_changes_the_record(tmp_path):
    before = [point.name for point in record(ARMS, tmp_path)]
    renamed = product(SEEDS, chain(arm("rate 0.001", {RATE: 1e-3}), [{}]))
    assert [point.name for point in record(renamed, tmp_path)] == before
    assert recorded(tmp_path) == list(zip(before, ["rate 0.001", ""] * 2, strict=True))
    swapped = product(SEEDS, chain(arm("slow", {}), arm("usual", {RATE: 1e-3})))
    record(swapped, tmp_path)
    assert recorded(tmp_path) == list(zip(before, ["usual", "slow"] * 2, strict=True))


def test_a_value_set_to_its_default_is_one_point_with_the_unset_one(tmp_path):
    rates = product(SEEDS, param(RATE, [1e-3, DEFAULT]))
    batches = product(SEEDS, param(BATCH, [8, 16]))  # 8 is the config's value
    points = expand(tiny_config(), chain(rates, batches), tmp_path)
    settings = [(p.config.seed, p.overrides.get(RATE), p.overrides.get(BATCH)) for p in points]
    assert settings == [
        *((0, 1e-3, None), (0, DEFAULT, 8), (1, 1e-3, None), (1, DEFAULT, 8)),
        *((0, None, 16), (1, None, 16)),
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"seed": 0}),
        ({"seed": 1}, {"seed": 1, "data_seed": 1, "init_seed": 1, "probe_seed": 1}),
        ({RATE: 1}, {RATE: 1.0}),
        ({}, {"phase_order": ["pretrain", "drift"]}),
    ],
)
def test_the_same_settings_are_one_point_in_a_sweep_and_in_its_folder(one, other, tmp_path):
    assert len(expand(tiny_config(), [one, other], tmp_path)) == 1
    (first,) = record([one], tmp_path)
    (second,) = record([other], tmp_path)
    assert second.name == first.name
    assert second.config == first.config
    stored = json.loads((tmp_path / "sweep.json").read_text())["points"]
    both = first.overrides | second.overrides  # so that a seed that one of them lacks has its row
    assert [point["overrides"] for point in stored] == [json.loads(json.dumps(both))]


@pytest.mark.parametrize(
    "other", [{"data_seed": 1}, {"seed": 1, "data_seed": 0}, {BATCH: 16}, {"phase_order": ()}]
)
def test_other_settings_are_another_point(other, tmp_path):
    assert len(expand(tiny_config(), [{}, other], tmp_path)) == 2


def test_a_point_of_the_folder_keeps_its_name_when_its_value_is_left_out(tmp_path):
    before = record(product(SEEDS, arm("usual", {RATE: DEFAULT})), tmp_path)
    after = record(product(SEEDS, arm("default rate", {})), tmp_path)
    assert [point.name for point in after] == [point.name for point in before]
    assert [name for _, name in recorded(tmp_path)] == ["default rate"] * 2


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (chain(arm("a", {}), arm("b", {})), r"arms 'a' and 'b' are one point, run"),
        (chain(arm("a", {}), arm("b", {RATE: DEFAULT})), r"arms 'a' and 'b' are one point, run"),
        (
            product(SEEDS, arm("SAM", param(BATCH, [8, 16]))),
            rf"arm 'SAM' has two points of seed 0: one with {BATCH}=8 and one with {BATCH}=16",
        ),
        (arm(" ", {}), "a name must be text on one line"),
        (arm("a\nb", {}), "a name must be text on one line"),
        ([{"arm": 3}], "arm 3: a name must be text"),
        (arm("$x$", {}), r"must not have a \$"),
    ],
)
def test_a_name_that_does_not_name_one_arm_is_refused(listed, message, tmp_path):
    with pytest.raises(InputError, match=message):
        expand(tiny_config(), listed, tmp_path)


def test_a_name_that_the_folder_has_on_other_settings_is_refused(tmp_path):
    record(product(SEEDS, arm("SAM", {BATCH: 16})), tmp_path)
    before = (tmp_path / "sweep.json").read_bytes()
    message = rf"'SAM' has two points of seed 0: one with {BATCH}=32 and, in .*, one .*=16; give"
    with pytest.raises(InputError, match=message):
        record(product(SEEDS, arm("SAM", {BATCH: 32})), tmp_path)
    assert (tmp_path / "sweep.json").read_bytes() == before
    record(product(param("seed", [2]), arm("SAM", {BATCH: 16})), tmp_path)  # one more seed


def test_two_names_of_one_point_are_a_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "from jaxflat import config as base_config\n"
        "from jaxflat.config import arm, chain\n"
        "get_config = lambda scale: base_config.base()\n"
        "get_sweep = lambda scale: chain(arm('one', {}), arm('other', {'model.width': 32}))\n"
    )
    workdir = tmp_path / "work"
    assert main.main([f"--config={tmp_path}/own.py", f"--workdir={workdir}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: arms 'one' and 'other' are one point, run: ")
    assert error.count("\n") == 1
    assert not workdir.exists()


def test_points_are_selected_by_the_name_of_their_arm(tmp_path):
    points = expand(tiny_config(), ARMS, tmp_path)
    assert select(points, "slow") == [point for point in points if point.arm == "slow"]
    assert select(points, "us*,0") == [points[1], points[3], points[0]]
    with pytest.raises(InputError, match=r"--points=fast matches none .* slow \("):
        select(points, "fast")


def test_a_sweep_that_has_begun_keeps_its_baseline(tmp_path):
    """The first arm is the baseline, and arms that are added later come after it."""
    record(ARMS, tmp_path)
    record(product(SEEDS, chain(arm("wide", {BATCH: 16}), arm("usual", {}))), tmp_path)
    assert list(dict.fromkeys(name for _, name in recorded(tmp_path))) == ["slow", "usual", "wide"]


def test_a_flag_that_makes_two_arms_equal_takes_their_names(tmp_path):
    listed = product(SEEDS, chain(arm("small", {BATCH: 8}), arm("large", {BATCH: 16})))
    assert without_keys(listed, [BATCH]) == [{"seed": 0}, {"seed": 1}]
    assert without_keys(listed, [RATE]) == listed
    three = chain(listed, product(SEEDS, arm("fast", {BATCH: 16, RATE: 0.5})))
    kept = without_keys(three, [BATCH])
    assert kept == [{"seed": 0}, {"seed": 1}, *product(SEEDS, arm("fast", {RATE: 0.5}))]


def test_points_of_joined_and_numeric_names_are_selected(tmp_path):
    sizes = chain(arm("small", {BATCH: 8}), arm("16", {BATCH: 16}))
    listed = expand(tiny_config(), product(SEEDS, sizes, arm("SAM", {})), tmp_path)
    assert {point.arm for point in select(listed, "small, SAM")} == {"small, SAM"}
    listed = expand(tiny_config(), product(SEEDS, chain(sizes, [{RATE: 0.5}])), tmp_path)
    assert {point.arm for point in select(listed, "16")} == {"16"}
    with pytest.raises(InputError, match="matches none"):
        select(listed, "0,")

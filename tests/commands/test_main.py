"""The command line: bad input is one line and exit code 2, and nothing is written."""

import json
import re
import warnings
from pathlib import Path

import pytest

from jaxflat import config as base_config
from jaxflat import main
from jaxflat.analysis import power
from jaxflat.config import chain, loading, param, product, seeds, validation, zipped
from jaxflat.config.sweeps import ARM
from jaxflat.storage.leased_folder import Folder
from jaxflat.sweeps import points, sweep_record

CONFIG = "configs/model_size_sweep.py"
GOOD = f"--config={CONFIG}:smoke"


@pytest.fixture
def config_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "user.py"
        path.write_text("from jaxflat import config as base_config\n" + text)
        return f"--config={path}"

    return write


@pytest.fixture(autouse=True)
def two_results(monkeypatch):
    """Predict from two made-up results: their number changes percentages only."""
    monkeypatch.setattr(power, "NUM_SWEEPS", 2)


BAD_ARGUMENTS = {
    ("--config.phases.pretrain.stepz=5",): "phases.pretrain.stepz.*nearest: phases.pretrain.steps",
    ("--config.phases.pretrain.steps=many",): "phases.pretrain.steps='many' is str; it must be int",
    ("--config.model.width=30",): "model.width=30 is not divisible by model.head_size=8",
    ("--config.model.name=lsmt",): "'lsmt' is not one of transformer, lstm, causal, lookup_table",
    (
        "--config.model.name=causal",
        "--config.model.width=30",
    ): "is not divisible by model.head_size=8",
    ("--config.model.cls=True", "--config.model.name=causal"): (
        "model.cls=True is for model.name='transformer'; set it to False"
    ),
    (
        *("--config.model.head_size=3", "--config.model.width=33"),
        *("--config.model.name=causal", "--config.model.block=modern"),
    ): "model.head_size=3 must be even for model.block='modern'",
    (
        *("--config.model.head_size=2", "--config.model.width=2"),
        *("--config.model.name=causal", "--config.model.block=modern"),
    ): "model.width=2 must be at least 3 for model.block='modern'",
    ("--config.model.block=modren",): "'modren' is not one of gpt, modern",
    ("--config.model=3",): "model is a section",
    ("--config.probes.shots=200",): "probes.shots=200 is int; it must be tuple",
    ("--config.language.hmm.tasks=(3,9)",): "tasks must be positions in 1..length=8; got 9",
    ("--config.phases.pretrain.batch_size=100", "--config.mesh.data=8"): (
        "batch_size=100 is not divisible by the 8"
    ),
    ("--config.mesh.data=9",): "mesh.data=9 times mesh.model=1, but there are 8 devices",
    ("--config.mesh.data=4", "--config.mesh.model=3"): "=4 times mesh.model=3, but there are 8",
    ("--config.mesh.model=3",): "is not divisible by the 3 devices of mesh.data times mesh.model",
    ("--multihost=maybe",): "--multihost: 'maybe' is not one of auto, on, off",
    ("--multihost=on",): "--multihost=on, but there is no cluster; start it with srun",
    ("--config.evaluation.batch_size=1000",): "evaluation.batch_size",
    ("--points=99",): "--points=99 matches none",
    ("--stages=trian",): "--stages: 'trian' is not one of train, flatness, probes, report",
    ("--wordkir=x",): "--wordkir=x: not an argument",
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids=lambda a: a[0])
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, tmp_path, capsys):
    workdir = tmp_path / "work"
    assert main.main([GOOD, f"--workdir={workdir}", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not workdir.exists()
    assert re.search(BAD_ARGUMENTS[arguments], error)


BAD_FILES = {
    "def get_config(scale=None):\n    return {}": "must return a ConfigDict",
    "def get_config(scale=None):\n    return base_config.base(": "SyntaxError",
    "x = 1": "get_config",
    "def get_config(scale=None):\n    c = base_config.base()\n    c.modle = 3\n"
    "    return c": "modle is not a config key; nearest: model",
    "def get_config(scale=None):\n    c = base_config.base()\n    del c.model.width\n"
    "    return c": "model.width is missing",
    "def get_config(scale=None):\n    return base_config.base()\n"
    "def get_sweep(scale=None):\n    return base_config.param('model.widht', [8])": "model.widht",
    "def get_config(scale=None):\n    return base_config.base()\n"
    "def get_sweep(scale=None):\n    return base_config.param('model.width', [8, 12])": (
        "model.width=12 is not divisible"
    ),
    "def get_config(scale=None):\n    c = base_config.base()\n"
    "    c.phases.more = base_config.phase()\n    return c": (
        "phases.more is not in phase_order=('pretrain',)"
    ),
    "def get_config(scale=None):\n    c = base_config.base()\n"
    "    c.phases.more, c.phases.most = base_config.phase(), base_config.phase()\n    return c\n"
    "def get_sweep(scale=None):\n"
    "    return base_config.param('phase_order', [('pretrain',), ('pretrain', 'more')])": (
        "phases.most is not in phase_order=('pretrain',) or in the phase_order of any other point"
    ),
}


@pytest.mark.parametrize("text", BAD_FILES, ids=BAD_FILES.get)
def test_bad_config_files_are_one_line_and_exit_code_2(text, config_file, tmp_path, capsys):
    workdir = tmp_path / "work"
    assert main.main([config_file(text), f"--workdir={workdir}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert BAD_FILES[text] in error
    assert not workdir.exists()


NO_EFFECT = {
    ("--config.model.name=lstm", "--config.model.head_size=4"): (
        "model.head_size=4 has no effect with model.name='lstm'; leave it at 8"
    ),
    ("--config.model.block=modern",): (
        "model.block='modern' has no effect with model.name='transformer'; leave it at 'gpt'"
    ),
    ("--config.model.features=log_p",): (
        "model.features='log_p' has no effect with model.name='transformer'; leave it at 'p'"
    ),
    ("--config.flatness.slices.extent=2.0",): (
        "flatness.slices.extent=2.0 has no effect in a sweep; leave it at 1.0"
    ),
    ("--config.training.together=4",): (
        "training.together=4 has no effect with one point; leave it at 1"
    ),
    ("--config.flatness.embedded_layers=3",): (
        "flatness.embedded_layers needs flatness.embedded_width; set both"
    ),
}
ONE_POINT = "def get_config(scale=None):\n    return base_config.base()"


@pytest.mark.parametrize("arguments", NO_EFFECT, ids=lambda a: a[-1])
def test_a_key_without_effect_is_refused(arguments, config_file, tmp_path, capsys):
    workdir = tmp_path / "work"
    assert main.main([config_file(ONE_POINT), f"--workdir={workdir}", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {NO_EFFECT[arguments]}\n"
    assert not workdir.exists()


OPTIMIZER = "phases.pretrain.optimizer"
OWN_KEYS = [  # what a point sets itself: the choice, then a key that has no effect with it
    {"model.name": "lstm", "model.head_size": 4},
    {"model.name": "lookup_table", "model.width": 16, "phase_order": ()},
    {"language.name": "dyck", "language.pcfg.length": 6},
    {f"{OPTIMIZER}.name": "adamw", f"{OPTIMIZER}.sam.radius": 0.1},
]


@pytest.mark.parametrize("own", OWN_KEYS, ids=lambda own: list(own)[1])
def test_a_points_own_key_without_effect_is_refused(own, tmp_path):
    config = base_config.base()
    expanded = points.expand(config, [{"seed": 1}, own], tmp_path)
    (choice, chosen), (key, value) = list(own.items())[:2]
    line = f"{key}={value!r} has no effect with {choice}={chosen!r}; leave it at "
    with pytest.raises(validation.InputError, match=re.escape(line)):
        sweep_record.check_sweep(config, expanded, tmp_path)


def test_given_labels_leave_labelings_without_effect():
    config = base_config.base()
    config.language.name, config.probes.labelings = "generated", ("map",)
    line = r"probes.labelings=\('map',\) has no effect with language.name='generated'; leave it at"
    with pytest.raises(validation.InputError, match=line):
        validation.check_effects(config, [({}, config)])


def test_a_flag_may_switch_the_model_of_a_sweep(tmp_path):
    flags = ["--config.model.name=lstm", "--dry_run", "--points=0", f"--workdir={tmp_path}"]
    assert main.main([GOOD, *flags]) == 0


def test_a_shared_key_with_an_effect_on_one_point_is_accepted(tmp_path):
    config = base_config.base()
    config.model.update(head_size=4, features="log_p")
    config.flatness.slices.extent = 1  # the default, as an int
    listed = param("model.name", ["transformer", "lstm"])
    listed += [{"model.name": "lookup_table", "phase_order": (), "model.head_size": 8}]
    sweep_record.check_sweep(config, points.expand(config, listed, tmp_path), tmp_path)


def test_an_older_sweep_continues_with_keys_without_effect(tmp_path, monkeypatch):
    config = base_config.base()
    config.model.update(name="lstm", head_size=4)
    expanded = points.expand(config, [{}], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(validation, "check_effects", lambda *_: None)
        sweep_record.record_sweep(config, expanded, Folder(tmp_path))
    sweep_record.record_sweep(config, expanded, Folder(tmp_path))


SHIPPED = [
    pytest.param(f"{path}:{scale}", marks=pytest.mark.slow if scale in ("full", "paper") else ())
    for path in sorted(Path("configs").glob("*.py"))
    for scale in ("smoke", "laptop", "full", "paper")
]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_sets_only_keys_with_effect(name):
    config, listed = loading.load(name)
    settings = [{key: point[key] for key in point if key != ARM} for point in listed]
    own = [(point, validation.validate(loading.override(config, point))) for point in settings]
    validation.check_effects(config, own)


def test_missing_config_file_and_unknown_scale(capsys):
    assert main.main(["--config=configs/none.py"]) == 2
    assert "configs/none.py: no such config file" in capsys.readouterr().err
    assert main.main([f"--config={CONFIG}:huge"]) == 2
    assert "'huge' is not one of smoke, laptop, full, gpu, paper" in capsys.readouterr().err


def test_no_config_is_exit_code_2(capsys):
    assert main.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: the following arguments are required: --config"


@pytest.mark.parametrize("names", ["fisher_trace", "hessian_trace,gradient_noise"])
def test_commas_separate_names(names):
    overrides = loading.parse_overrides([f"--config.flatness.measures={names}"])
    chosen = loading.override(base_config.base(), overrides)
    assert chosen.flatness.measures == tuple(names.split(","))


def test_flags_override_the_sweep(tmp_path):
    config, listed = loading.load(f"{CONFIG}:smoke")
    overrides = loading.parse_overrides(["--config.model.width=8", "--config.seed=7"])
    config = loading.override(config, overrides)
    expanded = points.expand(config, loading.without_keys(listed, overrides), tmp_path)
    assert {p.config.model.width for p in expanded} == {8}
    assert {p.config.data_seed for p in expanded} == {7}
    assert len({p.name for p in expanded}) == len(expanded) < len(listed)


def test_sweep_algebra():
    widths = zipped(param("w", [1, 2]), param("s", [10, 20]))
    assert product(param("seed", [0, 1]), widths) == [
        {"seed": 0, "w": 1, "s": 10},
        {"seed": 0, "w": 2, "s": 20},
        {"seed": 1, "w": 1, "s": 10},
        {"seed": 1, "w": 2, "s": 20},
    ]
    assert chain(param("w", [1]), param("v", [2])) == [{"w": 1}, {"v": 2}]
    assert seeds(2) == [{"seed": 0}, {"seed": 1}]
    assert seeds(1, num_languages=2) == [
        {"language.seed": 0, "seed": 0},
        {"language.seed": 1, "seed": 1},
    ]
    with pytest.raises(ValueError, match="twice"):
        product(param("w", [1]), param("w", [2]))
    with pytest.raises(ValueError, match="zip"):
        zipped(param("w", [1]), param("v", [1, 2]))


def test_points_are_selected_by_number_and_by_name(tmp_path):
    config, listed = loading.load(f"{CONFIG}:smoke")
    expanded = points.expand(config, listed, tmp_path)
    assert points.select(expanded, "0,2-3") == [expanded[0], *expanded[2:4]]
    seeds = points.select(expanded, "*seed=1*")
    assert seeds == [p for p in expanded if p.config.seed == 1]
    with pytest.raises(validation.InputError, match="matches none"):
        points.select(expanded, "*width=5_*")


def test_a_dry_run_numbers_points_as_they_are_chosen(tmp_path, capsys):
    workdir = tmp_path / "none"
    assert main.main([GOOD, "--dry_run", "--points=1,3", f"--workdir={workdir}"]) == 0
    assert re.findall(r"^  (\d+) ", capsys.readouterr().out, re.MULTILINE) == ["1", "3"]
    assert not workdir.exists()


def test_a_dry_run_says_which_points_one_program_trains(tmp_path, capsys):
    together = "--config.training.together=2"
    assert main.main([GOOD, "--dry_run", together, f"--workdir={tmp_path}/none"]) == 0
    found = re.findall(r"trained in one program of 2 slots: (.*);", capsys.readouterr().out)
    config, listed = loading.load(f"{CONFIG}:smoke")
    expanded = points.expand(config, listed, tmp_path)
    alike = {}
    for number, point in enumerate(expanded):
        if point.config.phase_order:
            model = point.config.model, point.config.phases.pretrain.steps
            alike.setdefault(repr(model), []).append(str(number))
    assert found == [", ".join(numbers) for numbers in alike.values()]
    assert all(len(numbers) == 2 for numbers in alike.values())


def test_a_repaired_grammar_file_is_a_line_each_once_for_all_points(config_file, tmp_path, capsys):
    path = tmp_path / "rounded.txt"
    path.write_text("S a 0.5\nS b 0.5003\nX X X 0.5\nX a 0.5\n")
    config = config_file(
        "def get_config(scale=None):\n    c = base_config.base()\n"
        "    c.language.name = 'grammar_file'\n"
        f"    c.language.grammar_file.update(path='{path}', length=1, tasks=((),))\n    return c\n"
        "def get_sweep(scale=None):\n"
        "    return base_config.param('language.seed', [0, 1])"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main.main([config, "--dry_run", f"--workdir={tmp_path}/none"]) == 0
    output = capsys.readouterr()
    assert len(re.findall(r"^  \d ", output.out, re.MULTILINE)) == 2
    assert output.err == (
        f"warning: {path}:3: no rules lead from 'S' to 'X': dropped\n"
        f"warning: {path}:1: the rules of 'S' sum to 1.0003, not to 1: normalised\n"
    )
    path.write_text("S a 0.5\nS b 0.52\n")
    other = "--config.language.data_dir=x"  # languages are made once in a process
    assert main.main([config, other, "--dry_run", f"--workdir={tmp_path}/none"]) == 2
    error = f"error: {path}:1: the rules of 'S' sum to 1.02, not to 1\n"
    assert capsys.readouterr().err == error


def test_a_dry_run_refuses_the_same_input_as_a_run(tmp_path, capsys):
    config, listed = loading.load(f"{CONFIG}:smoke")
    sweep_record.record_sweep(config, points.expand(config, listed, tmp_path), Folder(tmp_path))
    changed = "--config.phases.pretrain.batch_size=16"
    assert main.main([GOOD, "--dry_run", changed, f"--workdir={tmp_path}"]) == 2
    assert "phases.pretrain.batch_size=" in capsys.readouterr().err
    assert main.main([GOOD, "--dry_run", "--points=0", f"--workdir={tmp_path}"]) == 0
    below = f"--workdir={tmp_path}/sweep.json/below"
    for dry in ([], ["--dry_run"]):
        assert main.main([GOOD, below, *dry]) == 2
        assert f"{tmp_path}/sweep.json is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("together", "training.together"),
        ("optimizer.name", "phases.pretrain.optimizer"),
        ("flatness.batch_size", "flatness.microbatch_size or evaluation.batch_size"),
        ("sed", "seed"),
    ],
)
def test_a_misplaced_key_is_found_in_its_section(key, meant):
    with pytest.raises(validation.InputError, match=f"is not a config key; nearest: {meant}$"):
        loading.override(base_config.base(), {key: 1})


def test_a_points_overrides_identify_it(tmp_path):
    config, listed = loading.load(f"{CONFIG}:smoke")
    names = [p.name for p in points.expand(config, listed, tmp_path)]
    reversed_names = [p.name for p in points.expand(config, listed[::-1], tmp_path)]
    assert reversed_names[::-1] == names


def test_optimizers_and_languages_that_no_point_uses_may_come_and_go(tmp_path):
    def record(**changed):
        config, listed = loading.load(f"{CONFIG}:smoke")
        config.update_from_flattened_dict(changed)
        sweep_record.record_sweep(config, points.expand(config, listed, tmp_path), Folder(tmp_path))

    record()
    record(**{"phases.pretrain.optimizer.lion.b1": 0.5, "language.dyck.length": 6})
    for key, value in (("phases.pretrain.optimizer.adamw.b1", 0.5), ("language.hmm.num_states", 7)):
        with pytest.raises(validation.InputError, match=re.escape(key)):
            record(**{key: value})


def test_keys_newer_than_a_record_had_their_defaults(tmp_path):
    def record(**changed):
        config, listed = loading.load(f"{CONFIG}:smoke")
        config.update_from_flattened_dict(changed)
        sweep_record.record_sweep(config, points.expand(config, listed, tmp_path), Folder(tmp_path))

    record()
    stored = json.loads((tmp_path / "sweep.json").read_text())
    del stored["trains"]["model"]["cls"]
    del stored["trains"]["phases"]["pretrain"]["optimizer"]["skip_nonfinite"]
    (tmp_path / "sweep.json").write_text(json.dumps(stored))
    record()
    assert "cls" in json.loads((tmp_path / "sweep.json").read_text())["trains"]["model"]
    (tmp_path / "sweep.json").write_text(json.dumps(stored))
    with pytest.raises(validation.InputError, match=r"model\.cls=False, this one has"):
        record(**{"model.cls": True})


def test_validate_returns_a_good_config_unchanged():
    config = base_config.base()
    assert validation.validate(config).to_dict() == config.to_dict()

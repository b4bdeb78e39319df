"""The flags of the benchmark, and checks of their combinations."""

import argparse
import shutil
from pathlib import Path

from jaxflat.config.validation import InputError, check_choices, check_outputs
from jaxflat.console import CommandParser

GROUPS = ("training", "flatness", "languages")
BERT_SCRIPT = Path(__file__).with_name("bert_peer.py")
ON_REQUEST = ("sweep", "calibration", "verdicts")  # these take much memory or minutes: only by name

PEER_HELP = """
--peers=PYTHON times training steps of Hugging Face's BERT beside ours, in an interpreter that has
torch, transformers and numpy. --peer_script=FILE times another framework instead. FILE runs as
  PYTHON FILE width layers heads batch length sentences.npy
and takes training steps of that shape, one masked word a sentence, on the same device. The last
argument has the words of sentences, one a row, with -1 after the end. The last line of output must
contain the rate as "N sentences/s". Both take turns, at least 3 times.
"""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the flags; raise InputError if one is wrong, or they do not fit each other."""
    parser = CommandParser(
        prog="python -m jaxflat.benchmark",
        description="Measure this machine's peak, the speed of training and flatness relative to "
        "it, and the speed of languages, whose sizes are fixed. Three groups run only by name. "
        "sweep: how much faster runs train in one program than one after the other. calibration: "
        "how often the error bars of flatness contain the truth. verdicts: how often a report's "
        "verdict is false, on made-up sweeps.",
        epilog=PEER_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = (*GROUPS, *ON_REQUEST)
    some = f"of: {', '.join(groups)} (all but {', '.join(ON_REQUEST)})"
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=some)
    sizes = {"width": 64, "layers": 2, "head_size": 16, "batch": 64, "length": 16, "words": 200}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=_positive, default=default, help="(%(default)s)")
    parser.add_argument(
        "--probes_per_pass", type=_positive, default=4,
        help="probes of flatness in one pass; wide models are faster one by one (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=_positive, default=7, help="timed calls of each kind (%(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="minimum length of a timed call (%(default)s)"
    )
    parser.add_argument(
        "--seeds", type=_positive, default=2000, help="estimates of a calibration (%(default)s)"
    )
    parser.add_argument(
        "--sweeps", type=_positive, default=2000, help="made-up sweeps for verdicts (%(default)s)"
    )
    parser.add_argument(
        "--together", type=_positive, default=4, help="runs in one program, for sweep (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--language", choices=("hmm", "pcfg"), default="hmm",
        help="sentences of the training steps: hmm, all of --length words; pcfg, of 5 to --length",
    )  # fmt: skip
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of the peer script")
    parser.add_argument(
        "--peer_script", type=Path, default=BERT_SCRIPT, metavar="FILE", help="see below"
    )
    parser.add_argument(
        "--torch", metavar="PYTHON", help="interpreter with torch, transformers and "
        "curvlinops-for-pytorch, to time its curvature beside ours",
    )  # fmt: skip
    flags = parser.parse_args(arguments)
    check_choices("GROUP", flags.groups, groups)
    flags.groups = flags.groups or list(GROUPS)
    check_flags(flags)
    return flags


def check_flags(flags: argparse.Namespace) -> None:
    """Raise InputError on flags that do not fit each other."""
    if flags.width % flags.head_size:
        raise InputError(f"--width={flags.width} is not divisible by --head_size={flags.head_size}")
    if flags.peer_script != BERT_SCRIPT and not flags.peers:
        raise InputError("--peer_script needs --peers, its interpreter")
    if flags.peers and "training" not in flags.groups:
        raise InputError("--peers compares training; name that group too")
    if flags.torch and "flatness" not in flags.groups:
        raise InputError("--torch compares flatness; name that group too")
    for name in ("peers", "torch"):
        if (program := getattr(flags, name)) and not shutil.which(program):
            raise InputError(f"--{name}={program} is not a program")
    if "calibration" in flags.groups and flags.seeds < 2:
        raise InputError(f"--seeds={flags.seeds}: a coverage needs at least 2")
    if "sweep" in flags.groups and flags.together < 2:
        raise InputError(f"--together={flags.together} must be at least 2")
    if not flags.peer_script.is_file():
        raise InputError(f"--peer_script={flags.peer_script} is not a file")
    check_outputs(flags.json)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)

#!/usr/bin/env bash
# Run a sweep on this machine, and again until it is done or fails: a preempted run (exit code 75)
# goes on where it stopped. Arguments are those of jaxflat.main.
#
#   launch/local.sh --config=configs/model_size_sweep.py --workdir=runs/sizes
set -uo pipefail
stopped=
trap 'stopped=1' INT TERM

while true; do
    python -m jaxflat.main "$@"
    code=$?
    [ "$code" -eq 75 ] && [ -z "$stopped" ] || exit "$code"
    echo "preempted; going on" >&2
done

#!/usr/bin/env bash
# Run a sweep on this machine; rerun it while it is preempted (exit code 75). Each rerun resumes the
# saved state. All arguments go to jaxflat.main.
#
#   launch/local.sh --config=configs/model_size_sweep.py --workdir=runs/sizes
set -uo pipefail
stopped=
trap 'stopped=1' INT TERM

while true; do
    python -m jaxflat.main "$@"
    code=$?
    [ "$code" -eq 75 ] && [ -z "$stopped" ] || exit "$code"
    echo "preempted; resuming" >&2
done

#!/usr/bin/env bash
# Run a sweep for some minutes on one GPU: in a short allocation, or in a queue that preempts. Then
# copy the results of finished points, without checkpoints. Run the same command again to continue.
#
#   launch/one_gpu.sh configs/model_size_sweep.py:gpu --minutes=8 --workdir=/scratch/sizes \
#       --results=results/sizes
#
# A minute before the end, or at a SIGTERM, the sweep saves the point that it has begun in the work
# directory, and the exit code is 75. If the next allocation has another disk, this point starts
# again, and finished points do not. A point is finished when all its stages are done. Without
# --minutes there is no end. Defaults: runs/<config>-<scale> and results/<config>-<scale>. All other
# arguments go to jaxflat.main.
set -uo pipefail
config=${1:-} minutes=''
case $config in
    *.py:*) scale=${config#*:} ;;
    *.py) scale=laptop ;;
    *) echo "error: the first argument must be FILE.py:SCALE; see $0" >&2 && exit 2 ;;
esac
shift
name=$(basename "${config%%:*}" .py)-$scale
workdir=runs/$name results=results/$name
for argument in "$@"; do # keep those of jaxflat.main
    shift
    case $argument in
        --minutes=*) minutes=${argument#*=} ;;
        --workdir=*) workdir=${argument#*=} ;;
        --results=*) results=${argument#*=} ;;
        --minutes | --workdir | --results)
            echo "error: write $argument=VALUE, with an equals sign" >&2 && exit 2 ;;
        *) set -- "$@" "$argument" ;;
    esac
done
if [[ ! ${minutes:-2} =~ ^([2-9]|[1-9][0-9]+)$ ]]; then
    echo "error: --minutes=$minutes must be a whole number, at least 2" >&2 && exit 2
fi
if [ "$(realpath -m "$workdir")" = "$(realpath -m "$results")" ]; then
    echo "error: --results=$results must be another folder than --workdir" >&2 && exit 2
fi

is_finished() { grep -qs '"state": "done"' "$1/status.json"; }

list_results() { # a point's state comes after the lines that it promises
    mapfile -t finished < <(grep -sl '"state": "done"' ./*/status.json)
    find . "${finished[@]%/*}" -maxdepth 1 -name '*.csv' -o -name '*.json' ! -name status.json -o \
        -name '*.jsonl'
    find . -maxdepth 2 -name status.json
}

restore_results() { # points that another work directory has finished, each by one rename
    [ -e "$results/sweep.json" ] || return 0
    mkdir -p "$workdir" || return
    local point name copy
    for point in "$results"/*/; do
        name=$(basename "$point")
        if ! is_finished "$point" || is_finished "$workdir/$name"; then continue; fi
        copy=$(mktemp -d -p "$workdir") && cp -r "$point." "$copy" && rm -rf "${workdir:?}/$name" &&
            mv "$copy" "$workdir/$name" || return
    done
    [ -e "$workdir/sweep.json" ] || cp "$results"/*.* "$workdir"
}

restore_results || exit 1
limit=()
[ -z "$minutes" ] || limit=(timeout --preserve-status --kill-after=40 $((60 * minutes - 60)))
stopped='' child=''
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child"' INT TERM
"${limit[@]}" python -m jaxflat.main --config="$config" --workdir="$workdir" "$@" &
child=$!
[ -z "$stopped" ] || kill -TERM "$child"
stopped=''
wait "$child"
code=$?
while [ -n "$stopped" ]; do # a signal ended the wait
    stopped=''
    wait "$child"
    code=$?
done
trap '' INT TERM
if [ -e "$workdir/sweep.json" ]; then
    if ! { mkdir -p "$results" && target=$(realpath "$results") &&
        (cd "$workdir" && list_results | xargs -d '\n' cp --parents -t "$target"); }; then
        echo "error: the results could not be copied to $results" >&2
        exit "$((code > 0 ? code : 1))"
    fi
    echo "results of finished points: $results" >&2
fi
exit "$code"

#!/usr/bin/env bash
# Run a sweep on a TPU slice of Google Cloud: request the slice, run on all its hosts, replace a
# preempted slice, fetch the results, delete the slice. The slice runs the commit checked out here.
# If interrupted, run the same command to resume.
#
#   export NAME=sizes ZONE=us-east5-b TYPE=v6e-16 IMAGE=v2-alpha-tpuv6e SHARE=10.0.0.2:/share
#   launch/tpu_pod.sh --dry-run --config=configs/model_size_sweep.py:paper # only print the commands
#   launch/tpu_pod.sh --config=configs/model_size_sweep.py:paper
#
# SHARE is an NFS export (Filestore) that the hosts can reach: a spot slice loses its own disks. Its
# folder NAME is the work directory; all of it except checkpoints is copied to runs/NAME here.
set -uo pipefail
dry_run='' simulated='' config=''
for argument in "$@"; do # move each from the front to the back; drop --dry-run
    shift
    case $argument in --dry-run) dry_run=1 && continue ;; --config=*) config=1 ;; esac
    set -- "$@" "$argument"
done
if [ -z "$config" ]; then echo "error: --config=FILE.py:SCALE is missing; see $0" >&2 && exit 2; fi
for setting in NAME ZONE TYPE IMAGE SHARE; do
    if [ -z "${!setting:-}" ]; then echo "error: $setting is not set; see $0" >&2 && exit 2; fi
done
exec 3>&1

quote() { python3 -IS -c 'import shlex, sys; print(shlex.join(sys.argv[1:]))' "$@"; }
call() { if [ -n "$dry_run" ]; then quote "$@" >&3; else "$@"; fi; }
tpus() { call gcloud compute tpus "$@" --zone="$ZONE" --quiet; }
on_hosts() { tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2"; }

state() { # prints nothing if there is no slice
    tpus queued-resources list --filter="name~/$NAME\$" --format='value(state.state)' || echo unknown
    echo "$simulated"
}

create() {
    tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
        --runtime-version="$IMAGE" --spot
}

delete() { tpus queued-resources delete "$NAME" --force; }

prepare() {
    call git archive --format=tar.gz --output="/tmp/$NAME.tar.gz" HEAD &&
        tpus tpu-vm scp "/tmp/$NAME.tar.gz" "$NAME:jaxflat.tar.gz" --worker=all &&
        on_hosts all "mkdir -p jaxflat && tar -xzf jaxflat.tar.gz -C jaxflat" &&
        on_hosts all "python3 -m pip install --quiet --user uv" &&
        on_hosts all "python3 -m uv venv --quiet --allow-existing --python=3.11 venv" &&
        on_hosts all "python3 -m uv pip install --quiet --python=venv/bin/python './jaxflat[tpu]'" &&
        on_hosts all "sudo apt-get install -qq nfs-common && sudo mkdir -p /mnt/share" &&
        on_hosts all "mountpoint -q /mnt/share || sudo mount -t nfs $SHARE /mnt/share" &&
        on_hosts all "sudo install -d -o \$USER /mnt/share/$NAME"
}

run() { # waits for the lock: a run of a lost connection holds it until it ends
    on_hosts all "cd jaxflat && flock /tmp/jaxflat.lock $(quote ../venv/bin/python -m jaxflat.main \
        --multihost=on --workdir="/mnt/share/$NAME" "$@")"
}

fetch() {
    on_hosts 0 "tar -czf results.tar.gz -C /mnt/share --exclude=checkpoints --exclude=projected \
--exclude=recovery --exclude=trunks --exclude=locks $NAME" &&
        tpus tpu-vm scp "$NAME:results.tar.gz" "/tmp/$NAME.results.tar.gz" --worker=0 &&
        call mkdir -p runs &&
        call tar -xzf "/tmp/$NAME.results.tar.gz" -C runs
}

trap 'echo "the slice $NAME may still exist and cost money" >&2; exit 130' INT TERM
code=''
while [ -z "$code" ]; do
    case $(state) in
        '') create || exit 1; simulated=${dry_run:+ACTIVE} ;;
        SUSPENDED | FAILED) delete ;;
        ACTIVE)
            if prepare; then run "$@"; else false; fi
            code=$?
            case $code in
                0 | 2) ;; # done, or unusable input
                1 | 3)    # failed, unless the slice was preempted
                    sleep 60
                    [ "$(state)" = ACTIVE ] || code=''
                    ;;
                *) sleep 60 && code='' ;; # state saved, or connection lost
            esac
            ;;
        *) sleep 60 ;; # starting or stopping
    esac
done
fetch || echo "could not fetch the results; they are on $SHARE, in $NAME" >&2
delete
exit "$code"

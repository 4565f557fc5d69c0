#!/usr/bin/env bash
# Stops a run on every worker (it saves first; the same run.sh goes on from there); --delete gives the TPU VM back.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/lib.sh

usage() { echo "usage: launch/tpu_vm/stop.sh --name=my-tpu --zone=us-central2-b [--run=t5-1] [--delete] [--project=ID] [--dry_run]"; }

parse "name zone project run delete" "$@"
check_vm
[ -n "$RUN" ] || [ "$DELETE" = 1 ] || { usage >&2; die "say --run=..., --delete or both"; }
if [ -n "$RUN" ]; then
  check_run
  ssh_all "bash jaxft/launch/tpu_vm/on_worker.sh stop $RUN"
fi
if [ "$DELETE" = 1 ]; then
  run "$GCLOUD" compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
fi

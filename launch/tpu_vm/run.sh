#!/usr/bin/env bash
# Starts a run on every worker, as a service that does not need this connection. The same command again goes on with the run.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/lib.sh

usage() {
  echo "usage: launch/tpu_vm/run.sh --name=my-tpu --zone=us-central2-b --run=t5-1 --config=configs/t5.py:t5-base --workdir=/mnt/my-bucket/t5-1 [--project=ID] [--dry_run] [-- --config.steps=1000 ...]"
}

parse "name zone project run config workdir" "$@"
check_vm
check_folder WORKDIR /mnt/my-bucket/t5-1
check_job /mnt/my-bucket/t5-1
ssh_all "$(quoted bash jaxft/launch/tpu_vm/on_worker.sh start "$RUN" --config="$CONFIG" --workdir="$WORKDIR" "${EXTRA[@]+"${EXTRA[@]}"}")"

#!/usr/bin/env bash
# Follows the log of a run, by default on worker 0.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/lib.sh

usage() { echo "usage: launch/tpu_vm/logs.sh --name=my-tpu --zone=us-central2-b --run=t5-1 [--worker=0|all] [--project=ID] [--dry_run]"; }

WORKER=0
parse "name zone project run worker" "$@"
check_vm
check_run
check WORKER '[0-9]+|all' 0
ssh_all "tail -n 200 -F logs/$RUN.log"

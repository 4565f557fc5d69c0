#!/usr/bin/env bash
# Asks for a TPU VM through a queued resource and waits until it is there.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/lib.sh

usage() { echo "usage: launch/tpu_vm/create.sh --name=my-tpu --zone=us-central2-b --type=v4-8 [--version=RUNTIME] [--project=ID] [--spot] [--dry_run]"; }

parse "name zone project type version spot" "$@"
check_vm
check TYPE '[a-z0-9]+-[0-9]+' v5litepod-8
if [ -z "$VERSION" ]; then
  case "$TYPE" in
    v6e-*) VERSION=v2-alpha-tpuv6e ;;
    v5p-*) VERSION=v2-alpha-tpuv5 ;;
    v5litepod-*) VERSION=v2-alpha-tpuv5-lite ;;
    v[234]-*) VERSION=tpu-ubuntu2204-base ;;
    *) die "--type=$TYPE: name its runtime with --version=..." ;;
  esac
fi
check VERSION '[a-z0-9.-]+' tpu-ubuntu2204-base

flags=("${WHERE[@]}" "--node-id=$NAME" "--accelerator-type=$TYPE" "--runtime-version=$VERSION")
if [ "$SPOT" = 1 ]; then flags+=(--spot); fi
run "$GCLOUD" compute tpus queued-resources create "$NAME" "${flags[@]}"

describe=("$GCLOUD" compute tpus queued-resources describe "$NAME" "${WHERE[@]}" '--format=value(state.state)')
if [ "$DRY_RUN" = 1 ]; then run "${describe[@]}"; exit 0; fi
misses=0
while :; do
  state=$("${describe[@]}") || state=""
  echo "$(date '+%F %T') $NAME: ${state:-no answer}"
  case "$state" in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED | SUSPENDING) die "$NAME is $state; launch/tpu_vm/stop.sh --delete removes it" ;;
    "") misses=$((misses + 1)); [ "$misses" -lt 10 ] || die "$NAME: no answer 10 times" ;;
    *) misses=0 ;;
  esac
  sleep "${POLL_SECONDS:-30}"
done

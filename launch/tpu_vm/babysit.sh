#!/usr/bin/env bash
# Keeps a run going until it is done: a VM that was preempted or is gone is deleted, created, set up and started again with the
# same run name and work directory; a run that is not there on a healthy VM is started. Ends with the run's exit code.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/lib.sh

usage() {
  echo "usage: launch/tpu_vm/babysit.sh --name=my-tpu --zone=us-central2-b --type=v4-8 --run=t5-1 --config=configs/t5.py:t5-base --workdir=gs://bucket/t5-1 [--version=RUNTIME] [--project=ID] [--spot] [--dry_run] [-- --config.steps=1000 ...]"
}

parse "name zone project type version spot run config workdir" "$@"
check_vm
check TYPE '[a-z0-9]+-[0-9]+' v5litepod-8
check_job gs://bucket/t5-1

vm=("--name=$NAME" "--zone=$ZONE"); create=("--type=$TYPE"); dry=()
if [ -n "$PROJECT" ]; then vm+=("--project=$PROJECT"); fi
if [ -n "$VERSION" ]; then create+=("--version=$VERSION"); fi
if [ "$SPOT" = 1 ]; then create+=(--spot); fi
if [ "$DRY_RUN" = 1 ]; then dry=(--dry_run); fi
describe=("$GCLOUD" compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" '--format=value(state)')
ask=("$GCLOUD" compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all "--command=bash jaxft/launch/tpu_vm/on_worker.sh status $RUN")
delete=("$GCLOUD" compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet)

say() { echo "$(date '+%F %T') babysit: $*"; }
make_vm() {
  launch/tpu_vm/create.sh "${vm[@]}" "${create[@]}" "${dry[@]+"${dry[@]}"}" && launch/tpu_vm/setup.sh "${vm[@]}" "${dry[@]+"${dry[@]}"}"
}
start_run() {
  launch/tpu_vm/run.sh "${vm[@]}" "--run=$RUN" "--config=$CONFIG" "--workdir=$WORKDIR" "${dry[@]+"${dry[@]}"}" -- "${EXTRA[@]+"${EXTRA[@]}"}"
}

# Acts on one state of the VM; ends the script when the run has ended for good.
visit() {
  local answers code
  case "$1" in
    READY)
      answers=$("${ask[@]}" | sed -n 's/^status //p' | sort -u) || answers=""
      say "$NAME is READY, the run is: ${answers//$'\n'/, }"
      for code in $answers; do  # one worker that ended for good ends all: the others would wait for it for ever
        case "$code" in
          0 | 42 | running | absent) ;;
          *) launch/tpu_vm/stop.sh "${vm[@]}" "--run=$RUN" || true; say "the run ended with code $code"; exit "$code" ;;
        esac
      done
      case "$answers" in
        0) say "done"; exit 0 ;;
        "" | *running*) ;;
        *) start_run || say "the run did not start; trying again" ;;
      esac ;;
    CREATING | STARTING | RESTARTING | REPAIRING | STOPPING | DELETING | PREEMPTING | "no answer") say "$NAME is $1; waiting" ;;
    *)
      say "$NAME is $1; creating it anew"
      "${delete[@]}" || true
      { make_vm && start_run; } || say "no TPU yet; trying again" ;;
  esac
}

if [ "$DRY_RUN" = 1 ]; then
  run "${describe[@]}"; run "${ask[@]}"; run "${delete[@]}"
  make_vm; start_run
  exit 0
fi
while :; do
  errors=$(mktemp)
  state=$("${describe[@]}" 2>"$errors") || { if grep -qi 'not.found' "$errors"; then state=absent; else state="no answer"; fi; }
  rm -f "$errors"
  visit "$state"
  sleep "${POLL_SECONDS:-60}"
done

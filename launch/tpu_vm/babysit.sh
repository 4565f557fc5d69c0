#!/usr/bin/env bash
# Keeps a run going until it is done: a VM that was preempted or is gone is deleted, created, set up and started again with the
# same run name and work directory; a run that is not there on a healthy VM is started. Ends with the run's exit code, or with 1
# where a VM cannot be set up or given back. --delete gives the VM back when the run is done.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/lib.sh

usage() {
  echo "usage: launch/tpu_vm/babysit.sh --name=my-tpu --zone=us-central2-b --type=v4-8 --run=t5-1 --config=configs/t5.py:t5-base --workdir=/mnt/my-bucket/t5-1 [--bucket=my-bucket] [--version=RUNTIME] [--project=ID] [--spot] [--delete] [--dry_run] [-- --config.steps=1000 ...]"
}

parse "name zone project type version spot run config workdir bucket delete" "$@"
check_vm
check TYPE '[a-z0-9]+-[0-9]+' v5litepod-8
check_folder WORKDIR /mnt/my-bucket/t5-1
check_job /mnt/my-bucket/t5-1
check_bucket

vm=("--name=$NAME" "--zone=$ZONE"); create=("--type=$TYPE"); mount=(); dry=()
if [ -n "$PROJECT" ]; then vm+=("--project=$PROJECT"); fi
if [ -n "$VERSION" ]; then create+=("--version=$VERSION"); fi
if [ "$SPOT" = 1 ]; then create+=(--spot); fi
if [ -n "$BUCKET" ]; then mount=("--bucket=$BUCKET"); fi
if [ "$DRY_RUN" = 1 ]; then dry=(--dry_run); fi
describe=("$GCLOUD" compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" '--format=value(state)')
ask=("$GCLOUD" compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all "--command=bash jaxft/launch/tpu_vm/on_worker.sh status $RUN")
delete=("$GCLOUD" compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet)

say() { echo "$(date '+%F %T') babysit: $*"; }
case "$WORKDIR" in "/mnt/${BUCKET:-?}"/*) ;; *)
  say "--workdir=$WORKDIR is not in a bucket of --bucket; unless it lies on every new VM too, a preemption loses the run" >&2 ;;
esac

create_vm() { launch/tpu_vm/create.sh "${vm[@]}" "${create[@]}" "${dry[@]+"${dry[@]}"}"; }
setup_vm() { launch/tpu_vm/setup.sh "${vm[@]}" "${mount[@]+"${mount[@]}"}" "${dry[@]+"${dry[@]}"}"; }
start_run() {
  launch/tpu_vm/run.sh "${vm[@]}" "--run=$RUN" "--config=$CONFIG" "--workdir=$WORKDIR" "${dry[@]+"${dry[@]}"}" -- "${EXTRA[@]+"${EXTRA[@]}"}"
}

fresh=0 tries=0  # 1: this VM was asked for here and is not set up yet; ssh may not answer at once
try_setup() {
  tries=$((tries + 1))
  if setup_vm; then fresh=0; start_run || say "the run did not start; trying again"
  elif [ "$tries" -ge 5 ]; then say "the setup failed $tries times; giving up"; say_bill; exit 1
  else say "the setup failed; trying again"; fi
}

say_bill() { say "$NAME goes on costing money; this gives it back: $(quoted launch/tpu_vm/stop.sh "${vm[@]}" --delete)"; }
finish() {
  say "done"
  if [ "$DELETE" = 0 ]; then say_bill; exit 0; fi
  "${delete[@]}" || { say "$NAME could not be deleted"; say_bill; exit 1; }
  say "$NAME was given back"; exit 0
}

# Acts on one state of the VM; ends the script when the run has ended for good.
visit() {
  local answers code
  case "$1" in
    READY)
      if [ "$fresh" = 1 ]; then try_setup; return; fi
      answers=$("${ask[@]}" | sed -n 's/^status //p' | sort -u) || answers=""
      say "$NAME is READY, the run is: ${answers//$'\n'/, }"
      for code in $answers; do  # one worker that ended for good ends all: the others would wait for it for ever
        case "$code" in
          0 | 42 | running | absent) ;;
          *) launch/tpu_vm/stop.sh "${vm[@]}" "--run=$RUN" || true; say "the run ended with code $code"; say_bill; exit "$code" ;;
        esac
      done
      case "$answers" in
        0) finish ;;
        "" | *running*) ;;
        *) start_run || say "the run did not start; trying again" ;;
      esac ;;
    CREATING | STARTING | RESTARTING | REPAIRING | STOPPING | DELETING | PREEMPTING | "no answer") say "$NAME is $1; waiting" ;;
    *)
      say "$NAME is $1; creating it anew"
      fresh=1 tries=0
      "${delete[@]}" || true
      if create_vm; then try_setup; else say "no TPU yet; trying again"; fi ;;
  esac
}

if [ "$DRY_RUN" = 1 ]; then
  run "${describe[@]}"; run "${ask[@]}"; run "${delete[@]}"
  create_vm; setup_vm; start_run
  if [ "$DELETE" = 1 ]; then run "${delete[@]}"; fi
  exit 0
fi
while :; do
  errors=$(mktemp)
  state=$("${describe[@]}" 2>"$errors") || { if grep -qi 'not.found' "$errors"; then state=absent; else state="no answer"; fi; }
  rm -f "$errors"
  visit "$state"
  sleep "${POLL_SECONDS:-60}"
done

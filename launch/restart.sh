#!/usr/bin/env bash
# Runs a command and runs it again when it says so: exit code 42 (preempted, saved) or 128 and above (died by a signal, such
# as 134 when another host vanished, 137 out of memory). Any other code ends the loop, for 2 (bad input), 43 (numbers) and 44
# (storage) would come back the same. SIGTERM and SIGINT go to the command as SIGTERM, which saves; then nothing is restarted.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/restart.sh [--max=50] [--wait=10] [--also=41] [--status=FILE] [--dry_run] -- COMMAND...
  --max     restarts at most
  --wait    seconds before a restart
  --also    one more exit code to restart on (41: the cluster was not complete)
  --status  file that gets the last exit code when the loop ends
END
}

max=50 pause=10 also="" status="" dry=0
while [ $# -gt 0 ]; do
  case "$1" in
    --max=*) max=${1#*=} ;;
    --wait=*) pause=${1#*=} ;;
    --also=*) also=${1#*=} ;;
    --status=*) status=${1#*=} ;;
    --dry_run) dry=1 ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) usage >&2; exit 2 ;;
  esac
  shift
done
[ $# -gt 0 ] || { usage >&2; exit 2; }
case "$max" in '' | *[!0-9]*) echo "restart: --max=$max is not a number" >&2; exit 2 ;; esac
if [ "$dry" = 1 ]; then
  printf '%q ' "$@"; printf '\n'
  exit 0
fi

child="" stopping=0
forward() { stopping=1; if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null || true; fi; }
trap forward TERM INT
finish() { if [ -n "$status" ]; then echo "$1" >"$status"; fi; exit "$1"; }
if [ -n "$status" ]; then rm -f "$status"; fi

restarts=0
while :; do
  if [ "$stopping" = 1 ]; then finish 42; fi
  "$@" &
  child=$!
  if [ "$stopping" = 1 ]; then kill -TERM "$child" 2>/dev/null || true; fi
  while :; do  # a signal interrupts `wait`, the command goes on saving
    code=0; wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=""
  if [ "$stopping" = 1 ] || { [ "$code" != 42 ] && [ "$code" -lt 128 ] && [ "$code" != "${also:-42}" ]; }; then finish "$code"; fi
  if [ "$restarts" -ge "$max" ]; then
    echo "restart: exit code $code after $restarts restarts, which is --max; giving up" >&2
    finish "$code"
  fi
  restarts=$((restarts + 1))
  echo "restart: exit code $code; restart $restarts of $max in $pause s" >&2
  sleep "$pause" & child=$!
  wait "$child" || true
  child=""
done

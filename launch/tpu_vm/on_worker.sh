#!/usr/bin/env bash
# What the other scripts do on a worker: setup | start RUN FLAGS... | status RUN | stop RUN.
# A run is a transient systemd service: it outlives ssh, and a shutdown of the VM sends it SIGTERM and waits while it saves.
# Secrets such as HF_TOKEN=... go into ~/.jaxft.env on the workers.
set -euo pipefail
cd "$(dirname "$0")/../.."

say_or_run() { if [ "${DRY_RUN:-0}" = 1 ]; then printf '%q ' "$@"; printf '\n'; else "$@"; fi; }

setup() {
  local python=""
  for v in 3.13 3.12 3.11; do
    if command -v "python$v" >/dev/null && "python$v" -c 'import ensurepip' 2>/dev/null; then python=python$v; break; fi
  done
  if [ -n "$python" ]; then
    say_or_run "$python" -m venv .venv
  else  # the TPU images have Python 3.10
    say_or_run python3 -m pip install --user -q uv
    say_or_run python3 -m uv venv -q --seed --allow-existing --python 3.12 .venv
  fi
  say_or_run .venv/bin/pip install -q -c constraints.txt -e '.[tpu]'
}

start() {
  local run=$1 log="$HOME/logs/$1.log"; shift
  mkdir -p "$HOME/logs"
  if systemctl is-active --quiet "jaxft-$run" 2>/dev/null; then echo "running"; return; fi
  say_or_run sudo systemd-run --collect "--unit=jaxft-$run" "--uid=$(id -un)" "--working-directory=$PWD" \
    --property=KillMode=mixed --property=TimeoutStopSec=600 "--property=EnvironmentFile=-$HOME/.jaxft.env" \
    "--property=StandardOutput=append:$log" "--property=StandardError=append:$log" "--setenv=HOME=$HOME" \
    launch/restart.sh --also=41 "--status=$HOME/logs/$run.status" -- .venv/bin/python -m jaxft.main "$@"
}

status() {
  if systemctl is-active --quiet "jaxft-$1" 2>/dev/null; then echo "status running"
  elif [ -f "$HOME/logs/$1.status" ]; then echo "status $(cat "$HOME/logs/$1.status")"
  else echo "status absent"; fi
}

stop() { if systemctl is-active --quiet "jaxft-$1" 2>/dev/null; then say_or_run sudo systemctl stop "jaxft-$1"; fi; }

case "${1:-}" in
  setup | start | status | stop) "$@" ;;
  *) echo "usage: launch/tpu_vm/on_worker.sh setup | start RUN FLAGS... | status RUN | stop RUN" >&2; exit 2 ;;
esac

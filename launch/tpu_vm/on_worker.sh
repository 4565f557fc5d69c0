#!/usr/bin/env bash
# What the other scripts do on a worker: setup [BUCKET] | start RUN FLAGS... | status RUN | stop RUN.
# A run is a transient systemd service: it outlives ssh, and a shutdown of the VM sends it SIGTERM and waits while it saves.
# So is gcsfuse, which a shutdown stops after the run. Secrets such as HF_TOKEN=... go into ~/.jaxft.env on the workers.
set -euo pipefail
cd "$(dirname "$0")/../.."

say_or_run() { if [ "${DRY_RUN:-0}" = 1 ]; then printf '%q ' "$@"; printf '\n'; else "$@"; fi; }

# Mounts BUCKET, or else the one that the last setup mounted, at /mnt/BUCKET for this user; nothing where that is so already.
# No metadata are kept: gcsfuse keeps them for ever on TPU machines, and a worker would not see what another one wrote.
# Orbax finishes a checkpoint by renaming its folder, which gcsfuse refuses above --rename-dir-limit (its own default is 0).
mount_bucket() {
  local bucket=$1 at gcsfuse
  if [ -z "$bucket" ] && [ -s "$HOME/.jaxft.bucket" ]; then bucket=$(cat "$HOME/.jaxft.bucket"); fi
  if [ -z "$bucket" ]; then return 0; fi
  at=/mnt/$bucket
  if ! mountpoint -q "$at"; then
    if [ "${DRY_RUN:-0}" = 1 ]; then gcsfuse=gcsfuse
    elif ! gcsfuse=$(command -v gcsfuse); then
      echo "on_worker: gcsfuse is not installed on $(uname -n), so bucket $bucket cannot be mounted: install Google's gcsfuse package on every worker (Google Cloud's page \"Install Cloud Storage FUSE\"), or mount any other shared file system there and leave --bucket out" >&2
      return 1
    fi
    say_or_run sudo umount -l "$at" 2>/dev/null || true  # what a gcsfuse that died leaves behind
    { say_or_run sudo mkdir -p "$at" && say_or_run sudo systemd-run --collect "--unit=jaxft-mount-$bucket" --service-type=forking \
      --property=After=network-online.target "$gcsfuse" -o allow_other "--uid=$(id -u)" "--gid=$(id -g)" --implicit-dirs \
      --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$bucket" "$at"; } || {
      echo "on_worker: bucket $bucket could not be mounted at $at on $(uname -n); sudo journalctl -u jaxft-mount-$bucket says why (without ~/.jaxft.bucket a run starts without it)" >&2
      return 1
    }
  fi
  if [ "${DRY_RUN:-0}" = 0 ]; then echo "$bucket" >"$HOME/.jaxft.bucket"; fi
}

setup() {
  mount_bucket "${1:-}" || exit 44
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
  local run=$1 log="$HOME/logs/$1.log" bucket after=(--property=After=network-online.target); shift
  mkdir -p "$HOME/logs"
  if systemctl is-active --quiet "jaxft-$run" 2>/dev/null; then echo "running"; return; fi
  mount_bucket "" || { echo 44 >"$HOME/logs/$run.status"; exit 44; }  # gone after a reboot
  if [ -s "$HOME/.jaxft.bucket" ]; then
    bucket=$(cat "$HOME/.jaxft.bucket")
    after+=("--property=After=jaxft-mount-$bucket.service" "--property=RequiresMountsFor=/mnt/$bucket")
  fi
  # A service may lock 8 MiB of memory unless told otherwise, and transfers to a TPU by VFIO pin their buffers.
  say_or_run sudo systemd-run --collect "--unit=jaxft-$run" "--uid=$(id -un)" "--working-directory=$PWD" "${after[@]}" \
    --property=LimitMEMLOCK=infinity \
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
  *) echo "usage: launch/tpu_vm/on_worker.sh setup [BUCKET] | start RUN FLAGS... | status RUN | stop RUN" >&2; exit 2 ;;
esac

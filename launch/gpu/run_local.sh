#!/usr/bin/env bash
# Runs on all GPUs of this machine in one process, again after a preemption or a crash; --docker does so in a container, which
# sees the work directory, the caches, and (read-only, under the same path) the folder of each --mount.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/lib.sh

usage() {
  echo "usage: launch/gpu/run_local.sh --run=t5-1 --config=configs/t5.py:t5-base --workdir=/data/runs/t5-1 [--docker [--mount=/data/sets ...]] [--dry_run] [-- --config.steps=1000 ...]"
}

INSTALL='python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt ".[gpu]"'

# Refuses a JAX that would leave the GPUs idle and train on the CPU for days.
check_gpu() {
  local listed backend
  command -v nvidia-smi >/dev/null || return 0
  listed=$(nvidia-smi -L 2>&1) || { echo "launch: no GPU found; nvidia-smi says: ${listed%%$'\n'*}" >&2; return 0; }
  case "$listed" in *"GPU "[0-9]*) ;; *) return 0 ;; esac
  backend=$(XLA_PYTHON_CLIENT_PREALLOCATE=false "$1" -c 'import jax; print(jax.default_backend())') ||
    die "nvidia-smi lists a GPU, but JAX does not start in $1 (see above); to install it for GPUs: $INSTALL"
  [ "$backend" != cpu ] || die "nvidia-smi lists a GPU, but JAX in $1 finds only the CPU${JAX_PLATFORMS:+ (JAX_PLATFORMS=$JAX_PLATFORMS is set)}; to install it for GPUs: $INSTALL"
}

# The image holds this checkout but for launch/gpu/Dockerfile.dockerignore; any other --config must lie in a mounted folder.
check_config() {
  local file folder
  CONFIG=${CONFIG#"$PWD"/}; CONFIG=${CONFIG#./}
  case "$CONFIG" in runs/* | .venv/* | .git/*) CONFIG=$PWD/$CONFIG ;; esac
  file=${CONFIG%%:*}
  [ "$DRY_RUN" = 1 ] || [ -f "$file" ] || die "there is no file --config=$file (from $PWD)"
  case "$file" in /*) ;; *) return 0 ;; esac
  for folder in "$WORKDIR" "${MOUNTS[@]+"${MOUNTS[@]}"}"; do
    case "$file" in "${folder%/}"/*) return 0 ;; esac
  done
  die "--config=$file is not in the image; put it into this checkout, or give its folder too: --mount=${file%/*}"
}

run_docker() {
  local hf=${HF_HOME:-$HOME/.cache/huggingface} cache=${JAXFT_CACHE:-$HOME/.cache/jaxft} flags folder
  check_folder WORKDIR /data/runs/t5-1
  for MOUNT in "${MOUNTS[@]+"${MOUNTS[@]}"}"; do
    check_folder MOUNT /data/sets
    [ "$DRY_RUN" = 1 ] || [ -d "$MOUNT" ] || die "--mount=$MOUNT is not a folder of this machine"
  done
  check_config
  for folder in "$hf" "$cache"; do
    [[ $folder =~ ^/[^:]+$ ]] || die "HF_HOME and JAXFT_CACHE must be absolute paths without ':' for --docker; one is $folder"
  done
  flags=(--rm --gpus=all --shm-size=16g --stop-timeout=600 "--name=jaxft-$RUN" "--env=XLA_PYTHON_CLIENT_MEM_FRACTION=$share" --env=HF_TOKEN
         "--volume=$WORKDIR:$WORKDIR" "--volume=$hf:/root/.cache/huggingface" "--volume=$cache:/root/.cache/jaxft")
  for folder in "${MOUNTS[@]+"${MOUNTS[@]}"}"; do flags+=("--volume=$folder:$folder:ro"); done
  run mkdir -p "$WORKDIR" "$hf" "$cache"  # Docker would make them root's
  run docker build -f launch/gpu/Dockerfile -t jaxft .
  run_last docker run "${flags[@]}" jaxft -m jaxft.main "--config=$CONFIG" "--workdir=$WORKDIR" "${EXTRA[@]+"${EXTRA[@]}"}"
}

parse "run config workdir docker mount" "$@"
check_job /data/runs/t5-1
share=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}  # of the GPU's memory; JAX's own 0.75 leaves a quarter unused
if [ "$DOCKER" = 1 ]; then run_docker; exit 0; fi
[ "${#MOUNTS[@]}" = 0 ] || die "--mount is for --docker; without it a run sees this machine's folders as they are"
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
if [ "$DRY_RUN" = 0 ]; then check_gpu "$python"; fi
run_last env "XLA_PYTHON_CLIENT_MEM_FRACTION=$share" launch/restart.sh -- "$python" -m jaxft.main "--config=$CONFIG" "--workdir=$WORKDIR" "${EXTRA[@]+"${EXTRA[@]}"}"

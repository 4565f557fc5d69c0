#!/usr/bin/env bash
# Runs on all GPUs of this machine in one process, again after a preemption or a crash; --docker does so in a container.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/lib.sh

usage() {
  echo "usage: launch/gpu/run_local.sh --run=t5-1 --config=configs/t5.py:t5-base --workdir=/data/runs/t5-1 [--docker] [--dry_run] [-- --config.steps=1000 ...]"
}

parse "run config workdir docker" "$@"
check_job /data/runs/t5-1
job=(-m jaxft.main "--config=$CONFIG" "--workdir=$WORKDIR" "${EXTRA[@]+"${EXTRA[@]}"}")
share=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}  # of the GPU's memory; JAX's own 0.75 leaves a quarter unused

if [ "$DOCKER" = 1 ]; then
  check WORKDIR '/[A-Za-z0-9_./-]+' /data/runs/t5-1
  cache=${HF_HOME:-$HOME/.cache/huggingface}
  flags=(--rm --gpus=all --shm-size=16g --stop-timeout=600 "--name=jaxft-$RUN" "--env=XLA_PYTHON_CLIENT_MEM_FRACTION=$share" --env=HF_TOKEN
         "--volume=$WORKDIR:$WORKDIR" "--volume=$cache:/root/.cache/huggingface")
  run docker build -f launch/gpu/Dockerfile -t jaxft .
  run exec docker run "${flags[@]}" jaxft "${job[@]}"
else
  python=python3
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
  run exec env "XLA_PYTHON_CLIENT_MEM_FRACTION=$share" launch/restart.sh -- "$python" "${job[@]}"
fi

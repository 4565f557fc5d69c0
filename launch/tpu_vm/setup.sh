#!/usr/bin/env bash
# Copies this checkout (what git tracks, as it lies here) to every worker and installs it there.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/lib.sh

usage() { echo "usage: launch/tpu_vm/setup.sh --name=my-tpu --zone=us-central2-b [--project=ID] [--dry_run]"; }

parse "name zone project" "$@"
check_vm
code=$(mktemp -d)/jaxft.tgz
trap 'rm -rf "$(dirname "$code")"' EXIT
run bash -c "git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -czf $(quoted "$code") --files-from=-"
run "$GCLOUD" compute tpus tpu-vm scp "$code" "$NAME:jaxft.tgz" "${WHERE[@]}" --worker=all
ssh_all 'mkdir -p jaxft logs && tar -xzf jaxft.tgz -C jaxft && bash jaxft/launch/tpu_vm/on_worker.sh setup'

#!/usr/bin/env bash
# Copies this checkout (what git tracks or would track, as it lies here) to every worker and installs it there; --bucket mounts
# a bucket on every worker at /mnt/BUCKET.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/lib.sh

usage() { echo "usage: launch/tpu_vm/setup.sh --name=my-tpu --zone=us-central2-b [--bucket=my-bucket] [--project=ID] [--dry_run]"; }

parse "name zone project bucket" "$@"
check_vm
check_bucket
if [ "$DRY_RUN" = 1 ]; then
  code=/tmp/jaxft.tgz
else
  # An archive without the code would install nothing, or what an earlier one left.
  listed=$(git ls-files --cached --others --exclude-standard -- launch/tpu_vm/on_worker.sh 2>&1) || listed="git: ${listed%%$'\n'*}"
  [ "$listed" = launch/tpu_vm/on_worker.sh ] || die "$PWD is not a git checkout of jaxft, and setup.sh copies what git lists${listed:+ ($listed)}; clone jaxft, or run 'git init' here"
  code=$(mktemp -d)/jaxft.tgz
  trap 'rm -rf "$(dirname "$code")"' EXIT
fi
list="git ls-files -z --cached --others --exclude-standard"
run bash -o pipefail -c "$list | tar --null --ignore-failed-read -czf $(quoted "$code") --files-from=-" || die "the checkout could not be packed"
run "$GCLOUD" compute tpus tpu-vm scp "$code" "$NAME:jaxft.tgz" "${WHERE[@]}" --worker=all
ssh_all "mkdir -p jaxft logs && tar -xzf jaxft.tgz -C jaxft && bash jaxft/launch/tpu_vm/on_worker.sh setup${BUCKET:+ $BUCKET}"

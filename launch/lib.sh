# Shared by the launch scripts; sourced, not run. DRY_RUN=1 prints commands instead of running them.
# GCLOUD names the gcloud binary, so that tests can put a stand-in there.
# shellcheck shell=bash

DRY_RUN=0
GCLOUD=${GCLOUD:-gcloud}
NAME="" ZONE="" PROJECT="" TYPE="" VERSION="" RUN="" WORKDIR="" CONFIG="" WORKER="all" BUCKET="" SPOT=0 DELETE=0 DOCKER=0
EXTRA=() MOUNTS=()

die() { printf 'launch: %s\n' "$*" >&2; exit 2; }

# Prints the command, quoted so that it can be pasted; runs it unless --dry_run.
run() {
  printf '%q ' "$@"; printf '\n'
  if [ "$DRY_RUN" = 0 ]; then "$@"; fi
}

# The same for the last command of a script, which takes its place, so that signals reach it.
run_last() {
  printf '%q ' "$@"; printf '\n'
  if [ "$DRY_RUN" = 0 ]; then exec "$@"; fi
}

# parse "flag flag ..." "$@": reads --flag=value into variables of the flag's name in capitals, each --mount into MOUNTS; what
# follows -- goes to EXTRA.
parse() {
  local allowed=" $1 dry_run " word key; shift
  for word in "$@"; do
    shift
    [ "$word" = "--help" ] && { usage; exit 0; }
    [ "$word" = "--" ] && { EXTRA=("$@"); break; }
    key=${word%%=*}; key=${key#--}
    case "$allowed" in *" $key "*) ;; *) usage >&2; die "there is no $word here" ;; esac
    case "$word" in
      --dry_run) DRY_RUN=1 ;;
      --spot) SPOT=1 ;;
      --delete) DELETE=1 ;;
      --docker) DOCKER=1 ;;
      --mount=?*) MOUNTS+=("${word#*=}") ;;
      --*=?*) printf -v "$(tr '[:lower:]' '[:upper:]' <<<"$key")" '%s' "${word#*=}" ;;
      *) die "$word needs a value: --$key=..." ;;
    esac
  done
}

# check VARIABLE REGEX EXAMPLE: refuses a value that does not match, before anything runs. What passes has no space, quote or
# other character that a remote shell would read.
check() {
  local flag; flag=$(tr '[:upper:]' '[:lower:]' <<<"$1")
  [ -n "${!1}" ] || die "--$flag is missing, for example --$flag=$3"
  [[ ${!1} =~ ^($2)$ ]] || die "--$flag=${!1} is not allowed here; for example --$flag=$3"
  case "${!1}" in *..*) die "--$flag=${!1}: '..' is not allowed" ;; esac
}

check_vm() {
  check NAME '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' my-tpu
  check ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' us-central2-b
  WHERE=("--zone=$ZONE")
  if [ -n "$PROJECT" ]; then check PROJECT '[a-z][-a-z0-9]{4,28}[a-z0-9]' my-project; WHERE+=("--project=$PROJECT"); fi
}

# check_folder VARIABLE EXAMPLE: a folder of a mounted file system, named from the root. jaxft writes to nothing else.
check_folder() {
  check_no_address "$1"
  local flag; flag=$(tr '[:upper:]' '[:lower:]' <<<"$1")
  case "${!1}" in '' | /*) ;; *) die "--$flag=${!1} is not an absolute path; give one, for example --$flag=$2" ;; esac
  check "$1" '/[A-Za-z0-9_./-]+' "$2"
}

check_no_address() {
  local flag rest=${!1#*://}; flag=$(tr '[:upper:]' '[:lower:]' <<<"$1")
  case "${!1}" in
    *://*) die "--$flag=${!1} is an address, and jaxft writes to file systems only; mount the bucket and give the path below the mount, for example --$flag=/mnt/$rest (on TPU VMs, launch/tpu_vm/setup.sh --bucket=${rest%%/*} mounts it there)" ;;
  esac
}

check_bucket() { if [ -n "$BUCKET" ]; then check BUCKET '[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]' my-bucket; fi; }

check_run() { check RUN '[A-Za-z0-9][A-Za-z0-9_.-]{0,62}' t5-base-1; }

check_job() {
  check_run
  check CONFIG '[A-Za-z0-9_./-]+\.py(:[A-Za-z0-9_.,=-]+)?' configs/t5.py:t5-base
  check_no_address WORKDIR
  check WORKDIR '[/A-Za-z0-9_][A-Za-z0-9_./-]*' "$1"
}

# ssh_all COMMAND: on every worker (or the one of --worker).
ssh_all() { run "$GCLOUD" compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" "--worker=$WORKER" "--command=$1"; }

# Joins words into one string that a shell reads as the same words.
quoted() { printf '%q ' "$@" | sed 's/ $//'; }

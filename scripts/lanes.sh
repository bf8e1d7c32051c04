#!/usr/bin/env bash
# Runs the tests in a new environment for each lane: scripts/lanes.sh [LANE...] [-- PYTEST ARGUMENTS]
#   3.11   Python 3.11 and the newest packages
#   3.13   Python 3.13 and the newest packages
#   colab  Python 3.13 and what Colab has, see colab-constraints.txt
# Without a name, all of them. Exits with 77 where a lane's Python is not on this machine.
set -euo pipefail
cd "$(dirname "$0")/.."

find_python() { # 3.11: the path of a python3.11 on PATH, or else under pyenv
  local candidate
  for candidate in "$(command -v "python$1" || true)" \
    "$(pyenv root 2>/dev/null || true)/versions/$1".*/bin/python; do
    # pyenv's shims are on PATH even for versions that it would refuse to run
    "$candidate" -c pass 2>/dev/null && { echo "$candidate"; return; }
  done
  echo "there is no Python $1, neither on PATH nor under pyenv" >&2
  return 77
}

run_lane() { # name, then pytest's arguments
  local name=$1 version=$1 constraints=() environment python
  shift
  case $name in
    3.11 | 3.13) ;;
    colab) version=3.13 constraints=(-c scripts/colab-constraints.txt) ;;
    *) echo "there is no lane $name; there are 3.11, 3.13 and colab" >&2; return 2 ;;
  esac
  python=$(find_python "$version") || return
  environment=$(mktemp -d)
  # shellcheck disable=SC2064 # the folder of this lane, not of a later one
  trap "rm -rf '$environment'" EXIT
  echo "lane $name: $("$python" -V)"
  "$python" -m venv "$environment" || return
  "$environment/bin/pip" install -q -e '.[dev]' "${constraints[@]}" || return
  "$environment/bin/pytest" "$@"
}

lanes=()
while [[ $# -gt 0 && $1 != -- ]]; do
  lanes+=("$1")
  shift
done
[[ $# -eq 0 ]] || shift
[[ ${#lanes[@]} -gt 0 ]] || lanes=(3.11 3.13 colab)
worst=0
for lane in "${lanes[@]}"; do
  status=0
  (run_lane "$lane" "$@") || status=$? # a subshell, so that its environment goes when it ends
  [[ $status -eq 0 ]] || echo "lane $lane: exit status $status" >&2
  # A missing Python must not hide that another lane failed.
  [[ $status -eq 0 || ($status -eq 77 && $worst -ne 0) ]] || worst=$status
done
exit "$worst"

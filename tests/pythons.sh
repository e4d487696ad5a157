#!/usr/bin/env bash
# The tests on other Pythons: tests/pythons.sh VERSION… [-- ARGUMENTS OF PYTEST]
#
# For each, pythonVERSION makes a new virtual environment in a temporary folder, this checkout is copied
# there and installed with the extra `test` (from 3.13 on dm_control by itself, without labmaze),
# and pytest runs. The last lines say what passed; the exit status is 1 where one failed.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
pythons=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do pythons+=("$1"); shift; done
[ ${#pythons[@]} -gt 0 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; }
[ $# -eq 0 ] || shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
told=() status=0

try() {
    local python=$1 here=$work/$1
    shift
    "python$python" -m venv "$here" || return
    mkdir "$here/checkout"
    git -C "$root" ls-files -z | (cd "$root" && xargs -0 cp --parents -t "$here/checkout") || return
    cd "$here/checkout" || return
    "$here/bin/pip" install -q -U pip || return  # that of 3.10 searches for versions for very long
    "$here/bin/pip" install -q -e '.[test]' || return
    if "$here/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 13))'; then
        "$here/bin/pip" install -q --no-deps 'dm_control>=1.0.50,<2' || return
    fi
    "$here/bin/python" -m pytest "$@"
}

for python in "${pythons[@]}"; do
    if (try "$python" "$@"); then told+=("$python: passed"); else told+=("$python: FAILED"); status=1; fi
done
printf '%s\n' "${told[@]}"
exit "$status"

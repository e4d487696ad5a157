#!/bin/sh
# torch 2.13.0 (CPU): torchrun reads options that stand behind the script or module as its own where
# they are the beginning of two of its own: `torchrun -m train --run runs/a` ends with "ambiguous
# option", and train never starts. An option that it does not know in part is left alone.
#
# It parses with argparse, whose REMAINDER holds what follows the script, but which looks for
# abbreviations of options in the whole command line first. torchrun's own come in pairs, --run-path
# and --run_path, --log-dir and --log_dir, so that any beginning of one is ambiguous: --run, --log, --node,
# --master, --local, --start, --max. `--` before the script ends torchrun's options, with -m too:
# torchrun -m -- train --run runs/a.
#
# Seen with torch 2.13.0, Python 3.11:
#   --run x: status 2, ambiguous option: --run could match --run-path, --run_path
#   --log x: status 2, ambiguous option: --log could match
#   --steps x: status 0, ['--steps', 'x']
#   -- --run x: status 0, ['--run', 'x']
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.2.6"
cd "$folder"
echo 'import sys; print(sys.argv[1:])' > told.py
python="$folder/venv/bin/python"

# WORDS before the module, then the module's option and what must be seen.
try() {
    before=$1 option=$2 status=$3 seen=$4
    set +e
    # shellcheck disable=SC2086
    "$python" -m torch.distributed.run --standalone --nproc-per-node 1 -m $before told "$option" x \
        > said 2>&1
    found=$?
    set -e
    echo "$before $option x: status $found, $(tail -n 1 said)"
    if [ "$found" -ne "$status" ] || ! grep -qF -- "$seen" said; then
        echo "changed: expected status $status and: $seen"
        exit 1
    fi
}

try "" --run 2 "ambiguous option: --run could match --run-path, --run_path"
try "" --log 2 "ambiguous option: --log could match"
try "" --steps 0 "['--steps', 'x']"
try "--" --run 0 "['--run', 'x']"

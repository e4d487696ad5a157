#!/usr/bin/env bash
# The first minutes on a GPU, from a plain checkout: what is there, whether the numbers are right, how
# fast it is. Every result is written as it comes, the most important first; at the time limit it stops.
#
#   benchmarks/gpu_day.sh [--device cuda|cpu] [--minutes 9] [--out FOLDER] [--wheels FOLDER]
#
# It wants a Python (PYTHON, else python3) that has PyTorch and Triton, and a C++ compiler or the extension
# as it was built for that Python. Packages that are missing it takes from wheels in --wheels, without
# pip, into OUT/site; it says what is missing still, and goes on with what can run. --device cpu
# rehearses it. OUT (gpu-day by default) then holds summary.txt, the output of every step, and the
# times: ops/gpu.md without torch.compile, which takes minutes to compile, compiled/gpu.md with it.
# The exit status is 0 where nothing failed, be it that the time limit cut something off, else 1.
set -uo pipefail

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; }
device=cuda minutes=9 out=gpu-day wheels=
while [ $# -gt 0 ]; do
    case $1 in
        --device | --minutes | --out | --wheels)
            [ $# -ge 2 ] || { echo "$1 wants a value" >&2; exit 2; }
            declare "${1#--}=$2"
            shift 2 ;;
        -h | --help) usage; exit 0 ;;
        *) echo "no such option: $1" >&2; usage >&2; exit 2 ;;
    esac
done
[[ $device =~ ^(cuda|cpu)$ ]] || { echo "--device is cuda or cpu, got $device" >&2; exit 2; }
[[ $minutes =~ ^[0-9]*\.?[0-9]+$ ]] || { echo "--minutes is a number, got $minutes" >&2; exit 2; }
[ -z "$wheels" ] || [ -d "$wheels" ] || { echo "--wheels: no folder $wheels" >&2; exit 2; }
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) && wheels=${wheels:+$(cd "$wheels" && pwd)} || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD:$out/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
end=$(awk "BEGIN {print int($SECONDS + 60 * $minutes)}")
failed=0
trap 'kill $(jobs -p) 2> /dev/null' EXIT # Ctrl-C does not reach them
trap 'trap - INT; kill -INT $$' INT # bash asks its foreground command otherwise, which may miss it
: > "$out/summary.txt"

say() { printf '%4d s  %s\n' "$SECONDS" "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS COMMAND…: run it for so many seconds at most; OUT/NAME.txt holds what it says.
step() {
    local name=$1 most=$2 left=$((end - SECONDS)) begin=$SECONDS status said running shown
    shift 2
    ((most < left)) && left=$most
    ((left > 0)) || { say "$name: not reached"; return 1; }
    # To a file, not through a pipe: that is open for as long as anybody whom a step that was cut off
    # left behind in a session of its own.
    said="$out/$name.txt"
    : > "$said"
    timeout --kill-after=10 "$left" "$@" > "$said" 2>&1 &
    running=$!
    tail -n +1 -f -s 0.2 --pid="$running" "$said" &
    shown=$!
    wait "$running"
    status=$?
    wait "$shown"
    if ((status == 0)); then
        say "$name: done"
    elif ((status == 124 || status == 137)) && ((SECONDS - begin >= left)); then
        say "$name: cut off after $left s; what it had is kept"
        if grep -qwE 'FAILED|WRONG' "$said"; then
            say "$name: FAILED before that, see $name.txt"
            failed=1
        fi
    else
        say "$name: FAILED ($status), see $name.txt"
        failed=1
    fi
    return "$status"
}

unpack='
import importlib.metadata, pathlib, sys, zipfile
site, folder = map(pathlib.Path, sys.argv[1:])
for wheel in sorted(folder.glob("*.whl")):
    name = wheel.name.split("-")[0]
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
            for member in archive.infolist():  # a program is one by its mode, which is left behind
                if member.external_attr >> 16 & 0o111:
                    (site / member.filename).chmod(0o755)
        print("from a wheel:", name)
'
missing='
import importlib.util
# what is imported, and under it what that imports: nobody resolves the needs of a wheel here
needs = {"pybind11": "pybind11", "setuptools": "setuptools", "safetensors": "safetensors",
         "triton": "triton", "numpy": "numpy", "PIL": "pillow",
         "rich": "rich", "markdown_it": "markdown-it-py", "mdurl": "mdurl", "pygments": "pygments",
         "pytest": "pytest", "pluggy": "pluggy", "iniconfig": "iniconfig", "packaging": "packaging",
         "hypothesis": "hypothesis", "sortedcontainers": "sortedcontainers",
         "matplotlib": "matplotlib", "contourpy": "contourpy", "cycler": "cycler",
         "fontTools": "fonttools", "kiwisolver": "kiwisolver", "pyparsing": "pyparsing",
         "dateutil": "python-dateutil", "tzdata": "tzdata"}
print(*(name for module, name in needs.items() if importlib.util.find_spec(module) is None))
'
doctor='
from rich.console import Console
from fastdreamer.machine.doctor import report
report(Console(width=150))
'
reason='
from fastdreamer.ops.gpu import why_no_kernels
raise SystemExit(why_no_kernels())
'

[ -z "$wheels" ] || step wheels 60 "$python" -c "$unpack" "$out/site" "$wheels"
lacks=$("$python" -c "$missing")
[ -z "$lacks" ] || say "missing, so that some of it will fail: $lacks (carry their wheels, and name the folder by --wheels)"
"$python" -c "import fastdreamer._native" 2> /dev/null \
    || step build 400 "$python" setup.py -q build_ext --inplace || exit 1
step doctor 60 "$python" -c "$doctor"
if [ "$device" = cuda ]; then
    step gpu 60 "$python" -c "$reason" || exit 1
    chosen=on_the_gpu
else
    chosen=under_the_interpreter
fi
# Two fifths of the time at most; the benchmarks check their own numbers before they time them. Each
# check is a process that imports torch and compiles kernels: one after the other few get their turn.
abreast=()
"$python" -c "import xdist" 2> /dev/null && abreast=(-n 4)
step correctness $(((end - SECONDS) * 2 / 5)) \
    "$python" -m pytest -v "${abreast[@]}" -p no:cacheprovider tests/test_gpu.py -k "$chosen"
measure() {
    local folder=$1 left
    shift
    left=$(awk "BEGIN {print ($end - $SECONDS - 5) / 60}")
    step "$folder" $((end - SECONDS)) \
        "$python" -m benchmarks.gpu --device "$device" --out "$out/$folder" --minutes "$left" "$@"
}
measure ops --without reduce-overhead
measure compiled
say "results: $out"
exit "$failed"

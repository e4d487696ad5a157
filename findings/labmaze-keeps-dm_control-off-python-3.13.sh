#!/bin/sh
# dm_control 1.0.50 cannot be installed on Python 3.13, of which it says nothing, though its suite runs
# there: it needs labmaze, whose newest release, 1.0.6, has wheels up to Python 3.12 and builds from
# source with Bazel alone. Only the mazes of dm_control.locomotion import it.
#
# dm_control asks for Python >= 3.9 and is a pure Python wheel, so that pip takes it, and stops at
# labmaze. Without its needs, and with the others named by hand, the suite's tasks load and step.
#
# Seen with dm_control 1.0.50, MuJoCo 3.17.0, Python 3.13:
#   with its needs: not installed, labmaze
#   without labmaze: walker-walk steps, reward between 0 and 1, labmaze imported: False
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" "$@" -q --only-binary=:all: 2> "$folder/said"; }
{
    if pip install "dm_control==1.0.50"; then
        echo "with its needs: installed"
    else
        echo "with its needs: not installed, $(grep -o "found for labmaze" "$folder/said" | sort -u | cut -d' ' -f3)"
    fi
    pip install "mujoco==3.17.0" "numpy==2.2.6" absl-py dm-env dm-tree glfw lxml protobuf pyopengl \
        pyparsing requests scipy tqdm
    pip install --no-deps "dm_control==1.0.50"
    MUJOCO_GL=disable "$folder/venv/bin/python" -W ignore - 2> /dev/null <<'PY'
import sys

import numpy as np
from dm_control import suite

env = suite.load("walker", "walk", task_kwargs={"random": 0})
env.reset()
reward = env.step(np.zeros(6)).reward
between = "between 0 and 1" if 0 <= reward <= 1 else reward
print(f"without labmaze: walker-walk steps, reward {between}, labmaze imported:",
      "labmaze" in sys.modules)
PY
} | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
with its needs: not installed, labmaze
without labmaze: walker-walk steps, reward between 0 and 1, labmaze imported: False
SEEN

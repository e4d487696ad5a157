#!/bin/sh
# dm_control 1.0.50: an episode may have one control step more than its time limit holds.
#
# control.Environment divides the time limit by the control step, both in binary fractions, and ends
# the episode at the first whole step that is not below: 0.28 s in steps of 0.01 s are
# 28.000000000000004, and 29 steps are made; 0.29 s are 28.999999999999996, and 29 are made, too. The
# suite's own limits come out whole. Whoever stacks episodes of a limit of their own into arrays, or
# counts on the last step's discount, meets it.
#
# Seen with dm_control 1.0.50, MuJoCo 3.17.0, Python 3.11, cheetah run, steps of 0.01 s:
#   0.07 s: 8 steps
#   0.14 s: 15 steps
#   0.28 s: 29 steps
#   0.29 s: 29 steps
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "dm_control==1.0.50" "mujoco==3.17.0" "numpy==2.2.6"
cat > "$folder/ask.py" <<'PY'
import numpy as np
from dm_control import suite

for limit in (0.07, 0.14, 0.28, 0.29):
    env = suite.load("cheetah", "run", task_kwargs={"random": 0, "time_limit": limit})
    action, steps = np.zeros(env.action_spec().shape), 0
    timestep = env.reset()
    while not timestep.last():
        timestep, steps = env.step(action), steps + 1
    print(f"{limit} s: {steps} steps")
PY
MUJOCO_GL=disable "$folder/venv/bin/python" -W ignore "$folder/ask.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
0.07 s: 8 steps
0.14 s: 15 steps
0.28 s: 29 steps
0.29 s: 29 steps
SEEN

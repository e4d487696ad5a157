#!/bin/sh
# shimmy 2.0.1: the render_fps of dm_control's tasks are milliseconds a step, and all environments
# share the last one made's.
#
# A control step of cheetah is 0.01 s, one of walker 0.025 s: 100 and 40 pictures a second, where shimmy
# says 10 and 25. The number lies in the class's metadata, so that making another task changes that of
# those at work. gymnasium's RecordVideo takes it from there: a second of cheetah plays for ten, of walker
# for 1.6, and a gait that looks slow may be a fast one.
#
# Seen with shimmy 2.0.1, gymnasium 1.4.0, dm_control 1.0.50, mujoco 3.17.0, Python 3.11:
#   cheetah: 100 steps a second, render_fps 10
#   walker: 40 steps a second, render_fps 25
#   humanoid: 40 steps a second, render_fps 25
#   acrobot: 100 steps a second, render_fps 10
#   cheetah after walker was made: render_fps 25
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "shimmy==2.0.1" "gymnasium[mujoco]==1.4.0" "dm_control==1.0.50" \
    "mujoco==3.17.0" "numpy==2.4.6"
cat > "$folder/ask.py" <<'PY'
from dm_control import suite
from shimmy import DmControlCompatibilityV0


def ask(domain, task):
    env = suite.load(domain, task)
    steps = 1 / env.control_timestep()
    wrapped = DmControlCompatibilityV0(env)
    print(f"{domain}: {steps:.0f} steps a second, render_fps {wrapped.metadata['render_fps']:.0f}")
    return wrapped


cheetah = ask("cheetah", "run")
ask("walker", "walk")
ask("humanoid", "walk")
ask("acrobot", "swingup")
DmControlCompatibilityV0(suite.load("walker", "walk"))
print(f"cheetah after walker was made: render_fps {cheetah.metadata['render_fps']:.0f}")
PY
MUJOCO_GL=disable "$folder/venv/bin/python" -W ignore "$folder/ask.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
cheetah: 100 steps a second, render_fps 10
walker: 40 steps a second, render_fps 25
humanoid: 40 steps a second, render_fps 25
acrobot: 100 steps a second, render_fps 10
cheetah after walker was made: render_fps 25
SEEN

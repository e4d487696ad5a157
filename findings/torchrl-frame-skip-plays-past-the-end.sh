#!/bin/sh
# torchrl 0.14.1: FrameSkipTransform(3) makes one episode of two of the suite's: it does not look
# whether the episode has ended among the skipped frames.
#
# It steps the environment so many times and hands on what came last. Where the length is no
# multiple of the skip, the end lies before the last of them: an environment of dm_control begins anew
# at the step after its end, so that the end is never seen, a decision's reward and its step from
# one state to another reach over two episodes, and the next end that happens to fall on a last frame
# closes both. The suite's 1000 steps hold for 2, 4, 5 and 8, not for 3 and 6. The other way to say the
# same, frame_skip=3 of the environment itself, stops at the end.
#
# Seen with torchrl 0.14.1, tensordict 0.14.3, torch 2.13.0 (CPU), dm_control 1.0.50, Python 3.11,
# cheetah run, 1000 steps an episode, one rollout until "done":
#   frame_skip=2: 500 decisions, 1 episode begun
#   frame_skip=3: 334 decisions, 1 episode begun
#   FrameSkipTransform(2): 500 decisions, 1 episode begun
#   FrameSkipTransform(3): 667 decisions, 2 episodes begun
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torchrl==0.14.1" "tensordict==0.14.3" "torch==2.13.0" \
    "dm_control==1.0.50" "mujoco==3.17.0" "numpy==2.2.6"
cat > "$folder/ask.py" <<'PY'
import torch
from dm_control import suite
from torchrl.envs import DMControlWrapper, FrameSkipTransform, TransformedEnv


def ask(name, make):
    env = suite.load("cheetah", "run", task_kwargs={"random": 0})
    begin, begun = env.task.initialize_episode, []

    def counted(physics):
        begun.append(physics)
        begin(physics)

    env.task.initialize_episode = counted
    wrapped = make(env)
    begun.clear()  # what making it has begun
    torch.manual_seed(0)
    rollout = wrapped.rollout(2000)
    assert rollout["next", "done"][-1] and not rollout["next", "done"][:-1].any()
    episodes = f"{len(begun)} episode{'s' if len(begun) > 1 else ''}"
    print(f"{name}: {len(rollout)} decisions, {episodes} begun")


for skip in (2, 3):
    ask(f"frame_skip={skip}", lambda env: DMControlWrapper(env, frame_skip=skip))
for skip in (2, 3):
    ask(
        f"FrameSkipTransform({skip})",
        lambda env: TransformedEnv(DMControlWrapper(env), FrameSkipTransform(skip)),
    )
PY
export MUJOCO_GL=disable RL_LOGGING_LEVEL=ERROR TMPDIR="$folder"
"$folder/venv/bin/python" -W ignore "$folder/ask.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
frame_skip=2: 500 decisions, 1 episode begun
frame_skip=3: 334 decisions, 1 episode begun
FrameSkipTransform(2): 500 decisions, 1 episode begun
FrameSkipTransform(3): 667 decisions, 2 episodes begun
SEEN

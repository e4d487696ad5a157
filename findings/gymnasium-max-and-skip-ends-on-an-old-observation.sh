#!/bin/sh
# gymnasium 1.4.0: where an episode ends among the skipped frames, MaxAndSkipObservation returns an
# observation of the decision before, as the last of the episode.
#
# It takes the larger of the last two of `skip` frames, and keeps them in a buffer that is filled at
# those two places alone. An end at an earlier frame leaves the loop with the buffer as it was:
# from the decision before, or, in an episode's first decision, from the episode before (reset() does
# not clear it) or zeros. Reward and `terminated` are those of the end. So what a value is bootstrapped
# from at a time limit, or what a model of rewards and ends learns that ends look like, is a state
# that went on.
#
# Seen with gymnasium 1.4.0, numpy 2.3.5, Python 3.11: 200 episodes of CartPole, random actions, each
# held for 4 frames; the pole is down where |angle| > 0.2095 or |position| > 2.4.
#   episodes that end with the pole down: 200
#   ... whose last observation says so: 29
#   ... whose last observation equals the one before to the bit: 128
#   first decision over after 2 frames: [0. 0. 0. 0.]
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "gymnasium==1.4.0" "numpy==2.3.5"
cat > "$folder/ask.py" <<'PY'
import gymnasium
import numpy as np
from gymnasium.wrappers import MaxAndSkipObservation


def down(state):
    return abs(state[0]) > 2.4 or abs(state[2]) > 0.2095


rng = np.random.default_rng(0)
env = MaxAndSkipObservation(gymnasium.make("CartPole-v1"), skip=4)
fell = said = same = 0
for seed in range(200):
    obs, _ = env.reset(seed=seed)
    terminated = False
    while not terminated:
        before = obs
        obs, _, terminated, _, _ = env.step(int(rng.integers(2)))
    fell += down(env.unwrapped.state)
    said += down(obs)
    same += (obs == before).all()
print("episodes that end with the pole down:", fell)
print("... whose last observation says so:", said)
print("... whose last observation equals the one before to the bit:", same)
short = MaxAndSkipObservation(gymnasium.make("CartPole-v1", max_episode_steps=2), skip=4)
short.reset(seed=0)
print("first decision over after 2 frames:", short.step(1)[0])
PY
"$folder/venv/bin/python" -W ignore "$folder/ask.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
episodes that end with the pole down: 200
... whose last observation says so: 29
... whose last observation equals the one before to the bit: 128
first decision over after 2 frames: [0. 0. 0. 0.]
SEEN

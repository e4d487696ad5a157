#!/bin/sh
# gymnasium 1.4.0: an environment and a policy that are given one seed draw the same numbers.
#
# reset(seed=s) makes np_random by numpy's PCG64(SeedSequence(s)), which is default_rng(s) to the bit.
# So random actions of default_rng(s) in the episode that reset(seed=s) begins are the environment's
# own draws: Pendulum's first angle is pi times the first random action, for every seed. Its spaces
# draw the same stream, too: action_space.seed(s). Collected that way, actions tell about starts.
#
# Seen with gymnasium 1.4.0, numpy 2.3.5, Python 3.11:
#   same generator state: True
#   seeds of 100 whose first action is the first angle over pi: 100
#   ... by action_space.seed: 100
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "gymnasium[classic-control]==1.4.0" "numpy==2.3.5"
cat > "$folder/ask.py" <<'PY'
import math

import gymnasium
import numpy as np
from gymnasium.utils.seeding import np_random

generator, _ = np_random(7)
print("same generator state:", generator.bit_generator.state == np.random.default_rng(7).bit_generator.state)
env = gymnasium.make("Pendulum-v1").unwrapped
drawn = sampled = 0
for seed in range(100):
    env.reset(seed=seed)
    angle = env.state[0] / math.pi
    env.action_space.seed(seed)
    drawn += math.isclose(np.random.default_rng(seed).uniform(-1, 1), angle, rel_tol=1e-9)
    sampled += math.isclose(env.action_space.sample()[0] / 2, angle, rel_tol=1e-5)
print("seeds of 100 whose first action is the first angle over pi:", drawn)
print("... by action_space.seed:", sampled)
PY
"$folder/venv/bin/python" -W ignore "$folder/ask.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
same generator state: True
seeds of 100 whose first action is the first angle over pi: 100
... by action_space.seed: 100
SEEN

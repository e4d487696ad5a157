#!/bin/sh
# torch 2.13.0 (CPU): of one seed, randn draws other numbers at once than in pieces, and a batch's
# first row has other noise where rows follow it.
#
# Below 16 numbers it draws one after the other; from 16 on in blocks of 16, each of the first eight
# numbers paired with one of the last eight, and where the size is no multiple of 16 the last 16 are drawn
# anew. So an imagined trajectory whose noise is drawn a step at a time, 30 numbers as for the state of
# DreamerV1, is not the one whose noise is drawn before the loop, though seed, order and count are the
# same; nor is an agent's noise in a batch that it has alone. Sizes that are multiples of 16 agree, and
# torch.rand and NumPy's generators in all sizes. Comparing two loops needs the noise, not the seed.
#
# Seen with torch 2.13.0 (CPU), numpy 2.2.6, Python 3.11, numbers of seed 0 that are equal:
#   15 steps of 30, at once and step by step: numpy 450, torch.rand 450, torch.randn 14 of 450
#   15 steps of 32, at once and step by step: numpy 480, torch.rand 480, torch.randn 480 of 480
#   the first of 2 rows of 6, and the row alone: numpy 6, torch.rand 6, torch.randn 6 of 6
#   the first of 3 rows of 6, and the row alone: numpy 6, torch.rand 6, torch.randn 0 of 6
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.2.6"
cat > "$folder/ask.py" <<'PY'
import numpy as np
import torch


def by_numpy():
    return np.random.default_rng(0).standard_normal


def by_torch(draw):
    generator = torch.Generator().manual_seed(0)
    return lambda size: draw(size, generator=generator).numpy()


DRAWS = {
    "numpy": by_numpy,
    "torch.rand": lambda: by_torch(torch.rand),
    "torch.randn": lambda: by_torch(torch.randn),
}


def compare(what, size, pieces):
    equal = []
    for name, seeded in DRAWS.items():
        draw = seeded()
        parts = np.concatenate([draw(piece) for piece in pieces])
        equal.append(f"{name} {(seeded()(size)[: len(parts)] == parts).sum()}")
    print(f"{what}: {', '.join(equal)} of {sum(pieces)}")


compare("15 steps of 30, at once and step by step", 450, [30] * 15)
compare("15 steps of 32, at once and step by step", 480, [32] * 15)
compare("the first of 2 rows of 6, and the row alone", 12, [6])
compare("the first of 3 rows of 6, and the row alone", 18, [6])
PY
"$folder/venv/bin/python" "$folder/ask.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
15 steps of 30, at once and step by step: numpy 450, torch.rand 450, torch.randn 14 of 450
15 steps of 32, at once and step by step: numpy 480, torch.rand 480, torch.randn 480 of 480
the first of 2 rows of 6, and the row alone: numpy 6, torch.rand 6, torch.randn 6 of 6
the first of 3 rows of 6, and the row alone: numpy 6, torch.rand 6, torch.randn 0 of 6
SEEN

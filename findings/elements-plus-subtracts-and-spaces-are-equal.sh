#!/bin/sh
# elements 3.22.4: `10 + counter` is 10 minus the counter, and no two spaces are unequal.
#
# elements holds counters, spaces, checkpoints and metrics of DreamerV3's public code. Counter's
# addition from the left is written as its subtraction, so that `limit + step` lies before the start and
# sum() of counters is negative; `step + limit` is right. Space's comparison returns a tuple of one
# truth value, which is true whatever is in it: `==` holds for any two spaces and `!=` for none, so that
# a check of an environment's spaces against an agent's passes with every environment.
#
# Seen with elements 3.22.4, numpy 2.3.5, Python 3.11, a counter of 1000, a vector and an image:
#   step + 10 = 1010, 10 + step = -990, sum of [step, step] = -2000
#   image == vector: (False,), taken as True; image != vector: False
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "elements==3.22.4" "numpy==2.3.5"
cat > "$folder/ask.py" <<'PY'
import elements
import numpy as np

step = elements.Counter(1000)
total = sum([step, step])
print(f"step + 10 = {step + 10}, 10 + step = {10 + step}, sum of [step, step] = {total}")
vector, image = elements.Space(np.float32, (3,)), elements.Space(np.uint8, (64, 64, 3))
equal = image == vector
print(f"image == vector: {equal}, taken as {bool(equal)}; image != vector: {image != vector}")
PY
"$folder/venv/bin/python" "$folder/ask.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
step + 10 = 1010, 10 + step = -990, sum of [step, step] = -2000
image == vector: (False,), taken as True; image != vector: False
SEEN

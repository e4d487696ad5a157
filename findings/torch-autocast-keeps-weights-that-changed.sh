#!/bin/sh
# torch 2.13.0 (CPU): as long as an autocast context is open, modules compute with the weights of
# their first call in it, whatever optimisers or load_state_dict() have made of them since.
#
# A parameter's cast is cached until the outermost context ends, and nothing looks whether the
# parameter has changed. Around one forward pass that saves casts. Around a training loop the gradients
# of every step are those of the first weights; around a loop that acts, without gradients too, new
# weights of a learner are loaded and never acted by. No error is raised, and the parameters
# themselves do change. A context a pass, or cache_enabled=False, is right.
#
# Seen with torch 2.13.0, Python 3.11, a Linear layer:
#   a context a step: loss falls at each of 5 steps
#   one context: loss stays at each of 5 steps, weights changed
#   one context, cache_enabled=False: loss falls at each of 5 steps
#   new weights loaded within a context, under no_grad: output as before; after it: as loaded
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.2.6"
cat > "$folder/ask.py" <<'PY'
from contextlib import nullcontext

import torch

BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def trained(around, each):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(8, 1), torch.randn(64, 8)
    target = x.sum(1, keepdim=True)
    sgd, first, losses = torch.optim.SGD(layer.parameters(), lr=0.05), layer.weight.clone(), []
    with around:
        for _ in range(6):
            with each():
                loss = (layer(x) - target).square().mean()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
    changes = [b - a for a, b in zip(losses, losses[1:])]
    falls, stays = all(c < 0 for c in changes), not any(changes)
    loss = "falls" if falls else "stays" if stays else "does neither"
    changed = "" if falls else ", weights " + ("kept" if (layer.weight == first).all() else "changed")
    return f"loss {loss} at each of {len(changes)} steps{changed}"


print("a context a step:", trained(nullcontext(), lambda: torch.autocast(**BF16)))
print("one context:", trained(torch.autocast(**BF16), nullcontext))
uncached = torch.autocast(**BF16, cache_enabled=False)
print("one context, cache_enabled=False:", trained(uncached, nullcontext))

layer, new, x = torch.nn.Linear(8, 1), torch.nn.Linear(8, 1), torch.randn(64, 8)
with torch.no_grad():
    with torch.autocast(**BF16):
        before = layer(x)
        layer.load_state_dict(new.state_dict())
        within = layer(x)
    with torch.autocast(**BF16):
        after, loaded = layer(x), new(x)


def like(output):
    return "as before" if output.equal(before) else "as loaded" if output.equal(loaded) else "other"


print("new weights loaded within a context, under no_grad:",
      f"output {like(within)}; after it: {like(after)}")
PY
"$folder/venv/bin/python" "$folder/ask.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
a context a step: loss falls at each of 5 steps
one context: loss stays at each of 5 steps, weights changed
one context, cache_enabled=False: loss falls at each of 5 steps
new weights loaded within a context, under no_grad: output as before; after it: as loaded
SEEN

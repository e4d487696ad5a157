#!/bin/sh
# torch 2.13.0 (CPU): Adam(fused=True) updates a parameter by the wrong moments, silently, where a
# moment's strides differ from the parameter's; foreach and the plain loop do it right.
#
# Such moments are what load_state_dict() leaves of a checkpoint whose file format keeps no strides
# (safetensors), for convolutions in channels_last: it takes the tensors as they are. The fused kernel
# walks the memory of parameter, gradient and moments side by side and looks at no stride. A resumed
# run then goes on from scrambled moments, without an error and without a NaN.
#
# Seen with torch 2.13.0, Python 3.11, one Conv2d in channels_last, one step after a round trip:
#   plain: largest difference to the undisturbed step / largest step: 0.00
#   foreach: largest difference to the undisturbed step / largest step: 0.00
#   fused: largest difference to the undisturbed step / largest step: above 0.5
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.2.6" "safetensors==0.6.2" "packaging==25.0"
cat > "$folder/ask.py" <<'PY'
import sys

import torch
from safetensors.torch import load_file, save_file

MODES = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def made(mode):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    return conv, torch.optim.Adam(conv.parameters(), lr=1e-3, **MODES[mode])


def step(conv, adam, seed):
    image = torch.randn(4, 8, 9, 9, generator=torch.Generator().manual_seed(seed))
    adam.zero_grad()
    conv(image.to(memory_format=torch.channels_last)).square().mean().backward()
    before = conv.weight.detach().clone()
    adam.step()
    return conv.weight.detach() - before


for mode in MODES:
    conv, adam = made(mode)
    for seed in range(5):
        step(conv, adam, seed)
    weights = {name: value.clone() for name, value in conv.state_dict().items()}
    state = adam.state_dict()
    file = {
        f"{i}.{key}": value.contiguous().clone()
        for i, slot in state["state"].items()
        for key, value in slot.items()
    }
    save_file(file, sys.argv[1])
    want = step(conv, adam, 5)

    conv, adam = made(mode)
    conv.load_state_dict(weights)
    slots = {}
    for name, value in load_file(sys.argv[1]).items():
        i, key = name.split(".")
        slots.setdefault(int(i), {})[key] = value
    adam.load_state_dict({**state, "state": slots})
    off = ((step(conv, adam, 5) - want).abs().max() / want.abs().max()).item()
    text = "above 0.5" if off > 0.5 else f"{off:.2f}"
    print(f"{mode}: largest difference to the undisturbed step / largest step: {text}")
PY
"$folder/venv/bin/python" "$folder/ask.py" "$folder/adam.safetensors" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
plain: largest difference to the undisturbed step / largest step: 0.00
foreach: largest difference to the undisturbed step / largest step: 0.00
fused: largest difference to the undisturbed step / largest step: above 0.5
SEEN

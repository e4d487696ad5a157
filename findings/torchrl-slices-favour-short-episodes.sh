#!/bin/sh
# torchrl 0.14.1: SliceSampler draws an episode first, each with the same chance however long it is,
# then a start within it: steps of short episodes are seen more often than those of long ones.
#
# Drawn uniformly among the places where a slice can start, every step would be seen about as often. Here
# one of a 20-step episode is seen as often as a hundred of a 2000-step one together. Where episodes
# end in a fall, as Hopper's, they are short at first and long once the policy is good: training
# goes on with the falls of the beginning. Its documentation says that slices are drawn with
# replacement, not by which chance.
#
# Seen with torchrl 0.14.1, tensordict 0.14.3, torch 2.13.0 (CPU), Python 3.11: 100 episodes of 20
# steps and one of 2000, 20000 slices of 10 steps.
#   of the stored steps, the long episode has 50 %; of the places to start: 64 %
#   of the slices drawn: 1 %
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torchrl==0.14.1" "tensordict==0.14.3" "torch==2.13.0" "numpy==2.2.6"
cat > "$folder/ask.py" <<'PY'
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer

SHORT, STEPS, LONG, SLICE, DRAWN = 100, 20, 2000, 10, 20000
torch.manual_seed(0)
episode = torch.cat([torch.arange(SHORT).repeat_interleave(STEPS), torch.full((LONG,), SHORT)])
buffer = TensorDictReplayBuffer(
    storage=LazyTensorStorage(len(episode)),
    sampler=SliceSampler(slice_len=SLICE, traj_key="episode"),
    batch_size=DRAWN * SLICE,
)
buffer.extend(TensorDict({"episode": episode}, batch_size=[len(episode)]))
drawn = buffer.sample()["episode"].reshape(DRAWN, SLICE)
assert (drawn == drawn[:, :1]).all()
places = LONG - SLICE + 1
places = places / (places + SHORT * (STEPS - SLICE + 1))
print(f"of the stored steps, the long episode has {100 * LONG / len(episode):.0f} %; "
      f"of the places to start: {100 * places:.0f} %")
print(f"of the slices drawn: {100 * (drawn[:, 0] == SHORT).float().mean():.0f} %")
PY
RL_LOGGING_LEVEL=ERROR "$folder/venv/bin/python" -W ignore "$folder/ask.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
of the stored steps, the long episode has 50 %; of the places to start: 64 %
of the slices drawn: 1 %
SEEN

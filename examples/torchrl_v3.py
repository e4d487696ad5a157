"""torchrl's DreamerV3 world model, its recurrent loop made fast: the change of a training script.

Run it: ``python examples/torchrl_v3.py``, and with ``--own`` as torchrl has it. It needs
``pip install -e '.[torchrl]'``.
In torchrl's own script (sota-implementations/dreamer_v3) the change is the same: ``adapt`` around
``RSSMRolloutV3`` in ``dreamer_v3_agent.py``, in the place of ``compile_rollout``.
"""

import sys

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from tensordict.nn import TensorDictSequential as Seq
from torch import nn
from torchrl.modules import SymExpTwoHot
from torchrl.modules.models.model_based import RSSMPosteriorV3, RSSMPriorV3, RSSMRolloutV3
from torchrl.objectives import DreamerV3ModelLoss

from fastdreamer.rollout import adapt

OBS, ACTION, DETER, LATENTS, CLASSES, HIDDEN, BINS = 24, 6, 128, 8, 8, 64, 41
STATE = LATENTS * CLASSES


def world_model(fast=True):
    sizes = {"hidden_dim": HIDDEN, "rnn_hidden_dim": DETER, "unimix": 0.01}
    sizes |= {"num_categoricals": LATENTS, "num_classes": CLASSES}
    prior = RSSMPriorV3(
        action_shape=(ACTION,), action_dim=ACTION, recurrent_model="block_gru", **sizes
    )
    posterior = RSSMPosteriorV3(obs_embed_dim=HIDDEN, use_rms_norm=True, **sizes)
    rollout = RSSMRolloutV3(
        Mod(
            prior,
            in_keys=["state", "belief", "action"],
            out_keys=[("next", "prior_logits"), ("next", "state"), ("next", "belief")],
        ),
        Mod(
            posterior,
            in_keys=[("next", "belief"), ("next", "encoded_latents")],
            out_keys=[("next", "posterior_logits"), ("next", "state")],
        ),
        reset_key="is_init",
    )
    if fast:
        rollout = adapt(rollout)  # the change: TensorDict in and out as before
    encoder = nn.Sequential(nn.Linear(OBS, HIDDEN), nn.SiLU())
    feat = [("next", "state"), ("next", "belief")]
    model = Seq(
        Mod(encoder, in_keys=[("next", "observation")], out_keys=[("next", "encoded_latents")]),
        rollout,
        Mod(Head(OBS), in_keys=feat, out_keys=[("next", "reco_pixels")]),
        Mod(Head(BINS), in_keys=feat, out_keys=[("next", "reward_logits")]),
        Mod(SymExpTwoHot(BINS), in_keys=[("next", "reward_logits")], out_keys=[("next", "reward")]),
    )
    return model, rollout


class Head(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(STATE + DETER, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, outputs)
        )

    def forward(self, state, belief):
        return self.layers(torch.cat([state, belief], -1))


def batch(rows=8, steps=16):
    """Recorded sequences; an episode begins with each and somewhere within."""
    lead = rows, steps
    first = torch.rand(*lead, 1) < 0.1
    first[:, 0] = True
    observation = torch.randn(*lead, OBS)
    data = {
        "state": torch.zeros(*lead, STATE),
        "belief": torch.zeros(*lead, DETER),
        "action": torch.randn(*lead, ACTION).tanh(),
        "is_init": first,
        ("next", "observation"): observation,
        ("next", "pixels"): observation,
        ("next", "reward"): torch.randn(*lead, 1),
        ("next", "done"): torch.zeros(*lead, 1, dtype=torch.bool),
    }
    return TensorDict(data, lead)


def main(fast=True, updates=3):
    torch.manual_seed(0)
    model, rollout = world_model(fast)
    loss_module = DreamerV3ModelLoss(model, num_reward_bins=BINS, unimix=0.01)
    optimizer = torch.optim.Adam(model.parameters(), 3e-4)
    for _ in range(updates):
        losses, _ = loss_module(batch())
        loss = sum(value for key, value in losses.items() if key.startswith("loss_"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.4f}")
    if fast:
        print(rollout.rollout.verify())


if __name__ == "__main__":
    main(fast="--own" not in sys.argv)

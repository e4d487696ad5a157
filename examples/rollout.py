"""A Dreamer's world model of your own, its loops made fast without changing a result.

Run it: ``python examples/rollout.py``. Check it from the shell, in this directory:
``fastdreamer bench --module rollout:make``.
"""

import torch
from torch import nn

from fastdreamer.rollout import Rollout, StdTransform

ACTION, DETER, STOCH, EMBED, HIDDEN = 6, 200, 30, 256, 200


class WorldModel(nn.Module):
    """The caller's model, as it was."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Sequential(nn.Linear(STOCH + ACTION, HIDDEN), nn.ELU())
        self.gru = nn.GRUCell(HIDDEN, DETER)
        self.prior = mlp(DETER, HIDDEN, 2 * STOCH)
        self.post = mlp(DETER + EMBED, HIDDEN, 2 * STOCH)
        self.reward = mlp(DETER + STOCH, HIDDEN, 1)
        self.critic = mlp(DETER + STOCH, HIDDEN, 1)
        self.actor = mlp(DETER + STOCH, HIDDEN, HIDDEN, 2 * ACTION)


def mlp(*sizes):
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    layers = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ELU())]
    return nn.Sequential(*layers[:-1])


def make(model=None):
    model = model or WorldModel()
    return Rollout.from_modules(
        **dict(model.named_children()),
        std=StdTransform(min=0.1),  # softplus(y) + 0.1
        action_std=StdTransform(offset=5.0, min=1e-4),
    )


def main(updates=3):
    torch.manual_seed(0)
    model = WorldModel()
    rollout = make(model)
    optimizer = torch.optim.Adam(model.parameters(), 3e-4)
    embed, action = torch.randn(20, 8, EMBED), torch.randn(20, 8, ACTION).tanh()
    for _ in range(updates):
        seen = rollout.observe(embed, action)  # the whole sequence
        start = [part.detach().flatten(0, 1) for part in seen.state]
        dream = rollout.imagine(start, 15)  # 160 dreams of 15 decisions
        prior, post = (
            torch.distributions.Normal(*seen.prior),
            torch.distributions.Normal(*seen.post),
        )
        kl = torch.distributions.kl_divergence(post, prior).sum(-1).mean()
        value_loss = (dream.value - dream.returns.detach()).square().mean()
        loss = kl + value_loss - dream.returns.mean()
        optimizer.zero_grad()
        loss.backward()  # into .grad of the model's own parameters
        optimizer.step()
        print(f"loss {loss.item():.4f}")
    print(rollout.verify())


if __name__ == "__main__":
    main()

"""Two ranks learn from a batch each their half: run by torchrun, from test_ranks.py.

What they had and became is written to the folder in argv: settings, batch, metrics, weights.
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastdreamer.config import preset
from fastdreamer.learning.dreamer import Dreamer, NonFiniteLoss
from fastdreamer.learning.ranks import ALONE, Ranks

SHAPES, A, T, B, UPDATES = {"pixels": (64, 64, 3), "state": (5,)}, 3, 6, 4, 3
TINY = preset("tiny")
# Adam with a large ε is nearly gradient descent: its steps don't blow up what rounding makes of a
# gradient close to 0.
OPTIM = dataclasses.replace(TINY.optim, eps=1.0)
CASES = {
    "plain": {},
    "balanced": {
        "loss": dataclasses.replace(TINY.loss, kl_balance=0.8),
        "behavior": dataclasses.replace(TINY.behavior, return_norm=True, target_every=2),
        "model": dataclasses.replace(TINY.model, discount=True),
    },
    "categorical": {
        "loss": dataclasses.replace(TINY.loss, kl_balance=0.8, free_nats_each=True),
        "behavior": dataclasses.replace(TINY.behavior, return_norm=True, entropy=0.1),
        "model": dataclasses.replace(
            TINY.model, classes=4, unimix=0.01, cell="late-reset", norm="layer", readout="two-hot"
        ),
    },
}


def settings(name, free_nats=0.0):
    changes = dict(CASES[name])
    loss = changes.pop("loss", TINY.loss)
    loss = dataclasses.replace(loss, free_nats=free_nats)
    return dataclasses.replace(TINY, optim=OPTIM, loss=loss, **changes)


def batch():
    g = torch.Generator().manual_seed(7)
    x = {
        "pixels": torch.randint(0, 256, (T, B, 64, 64, 3), dtype=torch.uint8, generator=g),
        "state": torch.randn(T, B, 5, generator=g),
        "action": torch.rand(T, B, A, generator=g) * 2 - 1,
        "reward": torch.rand(T, B, generator=g),
        "is_first": torch.zeros(T, B, dtype=torch.bool),
        "terminated": torch.zeros(T, B, dtype=torch.bool),
    }
    x["state"][:, B // 2 :] *= 4  # the halves differ: what a mean of means may not hide
    x["is_first"][0, 0] = x["is_first"][3, 1] = x["terminated"][2, 3] = True
    return x


def half(batch, rank):
    return {name: x[:, rank * B // 2 : (rank + 1) * B // 2] for name, x in batch.items()}


def learn(config, batch, ranks=ALONE, updates=UPDATES):
    """Metrics of every update, and the weights in the end."""
    agent = Dreamer(config, SHAPES, A, ranks=ranks)
    optimizers, generator = agent.make_optimizers(), torch.Generator().manual_seed(1)
    metrics = []
    for _ in range(updates):
        metrics.append(agent.update(batch, optimizers, generator, health=True))
        agent.update_target()
    return metrics, agent.state_dict()


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    whole = batch()
    found = {}
    for name in CASES:
        # Of the halves' own KLs, one is below the free nats and the mean is above: the clamp must
        # see the mean.
        kls = [learn(settings(name), half(whole, rank), updates=1)[0][0]["kl"] for rank in (0, 1)]
        free = 0.75 * min(kls) + 0.25 * max(kls)
        found[name] = (free, learn(settings(name, free), half(whole, ranks.rank), ranks))
    whole["reward"][2, 3] = float("inf")  # in the second half
    try:
        learn(settings("plain"), half(whole, ranks.rank), ranks)
    except NonFiniteLoss as error:
        found["error"] = str(error)
    torch.save(found, Path(folder) / f"{ranks.rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

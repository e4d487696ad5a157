"""Train from Python, and sample what was collected: ``python examples/train.py [RUN [PRESET]]``.

With ``runs/example tiny`` in seconds, by default in about an hour.
"""

import sys

import numpy as np

import fastdreamer


def main(run="runs/example", preset="state"):
    config = fastdreamer.preset(preset, {"env": {"task": "walker-stand"}, "eval": {"episodes": 2}})
    fastdreamer.Trainer(run, config).train()  # stopped by Ctrl-C, it goes on when called again
    replay = fastdreamer.Replay(f"{run}/episodes")
    replay.load()
    batch = replay.sample(16, 8, np.random.default_rng(0))
    print({name: array.shape for name, array in batch.items()})


if __name__ == "__main__":  # the collecting process imports this file, too
    main(*sys.argv[1:])

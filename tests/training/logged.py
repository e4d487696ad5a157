"""What two runs are compared by."""

from fastdreamer.training.checkpoint import list_checkpoints, load_checkpoint
from fastdreamer.training.logger import read_metrics

WALL_CLOCK = ("seconds", "updates_per_s", "wait_collector_s", "wait_learner_s")


def logged(run_dir):
    """The lines of a run's metrics but for the clock."""
    return [
        {k: v for k, v in line.items() if k not in WALL_CLOCK} for line in read_metrics(run_dir)
    ]


def learned(run_dir):
    """Those, and the last weights and moments."""
    tensors, _ = load_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])
    return logged(run_dir), {name: x.tolist() for name, x in tensors.items()}

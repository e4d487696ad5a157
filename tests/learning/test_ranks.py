"""Ranks: two processes with half a batch each learn what one does with all of it."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import two_ranks

from fastdreamer.learning.ranks import ALONE, RankError, Ranks, together


def learn_together(folder):
    """What each of two ranks found."""
    script = Path(two_ranks.__file__)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environ = os.environ | {"PYTHONPATH": str(script.parents[2])}
    subprocess.run([*launch, script, folder], check=True, env=environ, timeout=240)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_two_ranks_learn_what_one_process_does(tmp_path):
    found = learn_together(tmp_path)
    for name in two_ranks.CASES:
        check_case(found, name)
    # What is not finite on one of them is said by both.
    assert found[0]["error"] == found[1]["error"]
    assert "reward loss became inf" in found[0]["error"]


def check_case(found, name):
    (free, (metrics, weights)), (_, (other_metrics, other_weights)) = (f[name] for f in found)
    for key, value in weights.items():
        assert torch.equal(value, other_weights[key]), f"{key} differs between the ranks"
    assert metrics == other_metrics
    config = two_ranks.settings(name, free)
    told, expected = two_ranks.learn(config, two_ranks.batch())
    for ours, theirs in zip(metrics, told, strict=True):
        for key, value in theirs.items():
            assert math.isclose(ours[key], value, rel_tol=1e-4, abs_tol=1e-6), key
    start = two_ranks.learn(config, two_ranks.batch(), updates=0)[1]
    moved = torch.cat([(expected[key] - start[key]).flatten().double() for key in start])
    apart = torch.cat([(weights[key] - expected[key]).flatten().double() for key in start])
    assert moved.norm() > 0 and apart.norm() < 1e-4 * moved.norm(), apart.norm() / moved.norm()


def test_a_rank_s_own_rows():
    noise = torch.arange(2 * 12).view(2, 12, 1)  # H = 2; T = 2, three ranks, two sequences each
    assert Ranks(1, 3).own(noise, 2)[..., 0].tolist() == [[2, 3, 8, 9], [14, 15, 20, 21]]
    posterior = torch.arange(2 * 6).view(2, 6, 1)  # T = 2
    own = Ranks(2, 3).own(posterior, 2)
    assert own[..., 0].tolist() == [[4, 5], [10, 11]] and own.is_contiguous()
    assert ALONE.own(noise, 2) is noise


GONE = "another process of the learner is gone"
FAILED = "an exchange with the other processes of the learner failed"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("[tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:20133"), GONE),
        (RuntimeError("[tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv"), GONE),
        (dist.DistNetworkError("The client socket has failed to connect to any address"), GONE),
        (dist.DistBackendError("ncclRemoteError: A call failed possibly due to a network"), GONE),
        (dist.DistBackendError("ncclInvalidUsage: Duplicate GPU detected"), FAILED),
        (RuntimeError("ProcessGroupGloo::allreduce: invalid tensor type"), FAILED),
        (torch.OutOfMemoryError("CUDA out of memory"), None),
        (NotImplementedError("c10d::allreduce_ for the meta backend"), None),
        (RecursionError("maximum recursion depth exceeded"), None),
    ],
)
def test_who_is_gone_and_what_failed_are_told_apart(error, told):
    with pytest.raises(RankError if told else type(error)) as raised, together():
        raise error
    assert str(raised.value).startswith(told or str(error)) and str(error) in str(raised.value)
    assert told is None or raised.value.__cause__ is error

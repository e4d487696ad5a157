"""Trained agents: ``load()`` of a run's or of one that comes with the package, and such a file."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdreamer.config import (
    Config,
    PlanConfig,
    SafetyConfig,
    architecture,
    differences,
    from_dict,
)
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.machine.device import resolve_device
from fastdreamer.ops.backend import check_backend
from fastdreamer.training.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_newest,
    runs_within,
    save_checkpoint,
)

_SHIPPED = Path(__file__).parents[1] / "data"
_TARGET = "target_critic."
_KEPT = ("version", "config", "architecture", "obs_shapes", "action_dim", "cursor")
"""Of a checkpoint's document, what is said of an agent; of its cursor, how long it has learned."""


def pretrained() -> dict[str, Path]:
    """The files of the trained agents that come with the package, by the name ``load`` takes."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.safetensors"))}


def find_agent(run_or_file: str | os.PathLike) -> Path:
    """A path as it is; the name of an agent that comes with the package, where no file has it, as
    the path of its file.

    Raises:
        CheckpointError: neither.
    """
    path, shipped = Path(run_or_file), pretrained()
    if path.exists():
        return path
    if str(run_or_file) in shipped:
        return shipped[str(run_or_file)]
    names = ", ".join(shipped) or "none"
    raise CheckpointError(
        f"{path}: no such run or checkpoint (agents that come with fastdreamer: {names})"
    )


def read_agent(
    run_or_file: str | os.PathLike,
) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The newest checkpoint of a run, a checkpoint or snapshot, or an agent of the package by name.

    Returns:
        Its file, its tensors by name and its JSON document.

    Raises:
        CheckpointError: there is none, or it is damaged or foreign.
    """
    path = find_agent(run_or_file)
    if not path.is_dir():
        return path, *load_checkpoint(path)
    found = load_newest(path / "checkpoints")
    if found is None:
        if files := sorted(path.glob("*.safetensors")):  # a run's checkpoints/ or snapshots/
            raise CheckpointError(f"{path} is no run; name one, or a file of it, as {files[-1]}")
        raise CheckpointError(f"{path} holds no checkpoint yet{runs_within(path)}")
    return found


def load(
    run_or_file: str | os.PathLike,
    *,
    plan: PlanConfig | None = None,
    safety: SafetyConfig | None = None,
    device: str | torch.device = "cpu",
) -> Dreamer:
    """Load a trained agent.

    Args:
        run_or_file: a run directory (its newest checkpoint), one checkpoint or snapshot file, or
            the name of an agent that comes with the package ("walker-walk").
        plan: settings of the planner in place of the run's own.
        safety: settings of the shield and the safety signal in place of the run's own; the barrier
            stays the run's. A module that only the file names as signal is never imported.
        device: where it computes: cpu, cuda, cuda:N, or auto, as in ``train``.

    Returns:
        The agent, ready for ``act(obs, state)``.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or foreign, or of another agent
            than its settings. ConfigError: no device has such a name. BackendError: there is no
            such device here.
    """
    path, tensors, meta = read_agent(run_or_file)
    config = dataclasses.replace(from_dict(meta["config"]), device=str(device)).validate()
    config = dataclasses.replace(config, device=resolve_device(config.device, config.backend))
    check_backend("auto", config.device)
    # A checkpoint of before the architecture was written down says nothing.
    if wrong := differences(meta.get("architecture", {}), architecture(config)):
        raise CheckpointError(
            f"{path}: not the agent that its settings describe: {'; '.join(wrong)}"
        )
    if plan is not None:
        config = dataclasses.replace(config, plan=plan)
    agent = Dreamer(config, meta["obs_shapes"], meta["action_dim"])
    weights = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith("agent/")}
    for name in [name for name in weights if name.startswith(_TARGET)]:  # an exported file's
        weights.setdefault(name.removeprefix("target_"), weights[name])
    agent.load_state_dict(weights)
    if safety is not None:
        # Beside what is seen alone: violations are anybody's, also of who learns no barrier.
        Config(env=config.env, safety=safety).validate()
        agent.config = dataclasses.replace(config, safety=safety)
    if agent.guard is not None:
        agent.guard.signal_of(agent.config, asked=safety is not None)
    return agent.eval()


def export_agent(run_or_file: str | os.PathLike, out: Path, *, half: bool = True) -> Path:
    """Write an agent's weights alone, without optimisers and replay.

    Args:
        run_or_file: run directory (its newest checkpoint), checkpoint or snapshot.
        out: the file; ``load`` reads it.
        half: as float16, half the size (``load`` computes in float32 from them); else float32.
            What is counted, as an explorer's rounds, stays as it is. Where the critic has a target,
            whom plans ask, that stands for both.

    Raises:
        CheckpointError: no checkpoint, or a weight that float16 cannot hold.
    """
    path, tensors, meta = read_agent(run_or_file)
    weights = {name: value for name, value in tensors.items() if name.startswith("agent/")}
    if half:
        if any(name.startswith(f"agent/{_TARGET}") for name in weights):
            weights = {n: w for n, w in weights.items() if not n.startswith("agent/critic.")}
        for name, value in weights.items():
            if not value.is_floating_point():
                continue  # what counts stays exact
            weights[name] = value.half()
            if not torch.isfinite(weights[name]).all():
                raise CheckpointError(f"{path}: {name} does not fit float16; export it in float32")
    about = {name: meta[name] for name in _KEPT if name in meta}
    about["cursor"] = {name: about["cursor"][name] for name in ("update", "env_frames")}
    save_checkpoint(out, weights, about)
    return out

"""What is looked at before a run: its task and signal, the renderer, its schedule, memory, disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from fastdreamer.acting.play import config_env
from fastdreamer.acting.signals import load_signal
from fastdreamer.config import Config, ConfigError
from fastdreamer.envs import is_foreign
from fastdreamer.envs.gl import select_gl
from fastdreamer.files import DiskFullError, file_in_the_way
from fastdreamer.machine.container import memory
from fastdreamer.machine.device import resolve_device
from fastdreamer.nn import Actor, ScalarHead, WorldModel
from fastdreamer.training.ranks import check_ranks

_LEARNING = 16
"""Bytes a parameter takes while it learns: itself, its gradient and Adam's two moments, float32."""
_STACK = 8 << 20  # bytes of a thread's stack
_THREADS = 8
"""Threads, and workers, a core at most; more can only wait for each other."""


def check(config: Config, run_dir: Path, say: Callable[[str], None]) -> None:
    """Refuse a run that cannot work here, before anything of it is written.

    Args:
        config: of the run. run_dir: where it goes or, of one that goes on, is.
        say: receives what may become short on the way.

    Raises:
        EnvError: the suite's tasks do not load. GLError: it is to see pixels and nothing draws.
        ConfigError: ranks that cannot learn it together, a file is where the run goes or nothing
            can be written there, its safety signal cannot be had, random episodes fill all of it,
            or it takes more memory or threads than there are.
        DiskFullError: there is no room for its checkpoints.
    """
    check_ranks(config)
    if file := file_in_the_way(run_dir):
        raise ConfigError(f"--run {run_dir}: {file} is a file, not a directory")
    if not os.access(place := _there(run_dir), os.W_OK | os.X_OK):
        raise ConfigError(f"{run_dir}: {place} cannot be written to")
    env = config_env(config)
    env.close()
    seen = env.obs_shapes
    if "pixels" in seen and config.env.render == "opengl" and not is_foreign(env.task):
        select_gl()
    if config.safety.signal != "none":
        load_signal(config, seen["state"][0])
    frames = env.max_decisions * env.action_repeat
    prefill = config.collect.prefill * frames
    goes_on = (run_dir / "config.json").exists()
    shorter = config.model.discount  # perhaps: episodes of such a task may end early
    if prefill >= config.train.frames and not goes_on and not shorter:
        raise ConfigError(
            f"collect.prefill = {config.collect.prefill} random episodes of up to {frames} env "
            f"frames leave nothing of train.frames = {config.train.frames} to learn in"
        )
    cores = os.cpu_count() or 1
    if config.threads > _THREADS * cores:
        raise ConfigError(
            f"threads must be at most {_THREADS} a core, {_THREADS * cores} here, got "
            f"{config.threads}, whose stacks alone are {_size(config.threads * _STACK)}"
        )
    if config.collect.workers > _THREADS * cores:
        raise ConfigError(
            f"collect.workers must be at most {_THREADS} a core, {_THREADS * cores} here, got "
            f"{config.collect.workers}"
        )
    learned = _parameters(config, seen, env.action_dim)
    _check_memory(config, seen, env.action_dim, learned)
    _check_disk(config, seen, learned, run_dir, say)


def _parameters(config: Config, seen: dict[str, tuple[int, ...]], action_dim: int) -> int:
    """How many there are, explorer and barrier left out; none is made."""
    model, behavior = config.model, config.behavior
    try:
        with torch.device("meta"):
            world = WorldModel(model, seen, action_dim)
            parts, feat = [world], world.rssm.feat_size
            if config.agent == "dreamer":
                parts.append(Actor.from_config(model, behavior, feat, action_dim))
                parts.append(ScalarHead.from_config(model, feat, behavior.critic_layers))
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ConfigError(f"the model's sizes take more than {_size(1 << 63)}: {error}") from error
    return sum(p.numel() for part in parts for p in part.parameters())


def _check_memory(
    config: Config, seen: dict[str, tuple[int, ...]], action_dim: int, learned: int
) -> None:
    """Refuse what cannot fit: a lower bound, of the tensors that are there without any doubt."""
    model, rows = config.model, config.replay.batch * config.replay.length
    state = model.deter + model.stoch * (model.classes or 1)
    batch = rows * sum(torch.Size(shape).numel() for shape in seen.values())
    dream = 4 * rows * config.behavior.imag_horizon * (state + action_dim)
    plan = 4 * config.plan.num_samples * (state + config.plan.plan_horizon * action_dim)
    takes = {
        f"{learned:,} parameters (model)": _LEARNING * learned,
        "one batch (replay.batch, replay.length)": batch,
        "its imagination (behavior.imag_horizon)": dream if config.agent == "dreamer" else 0,
        "a plan's candidates (plan.num_samples, plan.plan_horizon)": plan,
    }
    device = resolve_device(config.device, config.backend)
    if device == "cpu":
        there, whose = memory()
    else:
        there, whose = torch.cuda.get_device_properties(device).total_memory, device
    if sum(takes.values()) > there:
        most = sorted(takes, key=takes.__getitem__)[::-1]
        told = ", ".join(
            f"{_size(takes[name])} for {name}" for name in most if takes[name] > 1 << 20
        )
        raise ConfigError(f"this takes at least {told}; {whose} has {_size(there)}")


def _check_disk(
    config: Config,
    seen: dict[str, tuple[int, ...]],
    learned: int,
    run_dir: Path,
    say: Callable[[str], None],
) -> None:
    place = _there(run_dir)
    free, train = shutil.disk_usage(place).free, config.train
    # Of weights and moments; one is being written beside those kept.
    saved = 12 * learned * (1 if (run_dir / "checkpoints").exists() else train.keep_checkpoints + 1)
    bytes_of = {"pixels": 1, "state": 4}
    decision = sum(bytes_of[kind] * torch.Size(shape).numel() for kind, shape in seen.items())
    frames = min(train.frames, config.replay.capacity)
    replay = frames // config.env.action_repeat * decision
    if free < saved:
        raise DiskFullError(
            f"{place}: {_size(free)} are free, the checkpoints alone take {_size(saved)}: make "
            "room, or choose another --run"
        )
    if free < saved + replay:
        say(
            f"note: {_size(free)} are free at {place}, checkpoints and {frames:,} env frames of "
            f"replay take about {_size(saved + replay)} (--replay.capacity keeps fewer)"
        )


def _there(run_dir: Path) -> Path:
    """A run's directory or, of one to be made, the nearest above it that is there."""
    place = run_dir.absolute()
    while not place.exists():
        place = place.parent
    return place


def _size(count: float) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        units.pop(0)
        count /= 1024
    return f"{count:.3g} {units[0]}" if count < 1000 else f"{count:,.0f} {units[0]}"

"""Where and how exactly a run computes: what ``--device``, ``--backend``, ``--precision`` and
``--threads`` mean together on this machine."""

from __future__ import annotations

import dataclasses

import torch

from fastdreamer.config import Config, ConfigError
from fastdreamer.machine.container import cpu_quota
from fastdreamer.machine.cores import learner_threads, within_quota
from fastdreamer.ops.backend import (
    check_backend,
    chosen_backend,
    describe_kernels,
    faster_precision,
    kernel_choice,
    why_slow,
)
from fastdreamer.ops.codec import DECODE
from fastdreamer.ops.gpu import interpreting, why_no_kernels

TORCH_CORES = torch.get_num_threads()
"""As torch counts them before anybody sets a number: physical ones that this process may use, and
no more than ``OMP_NUM_THREADS``."""
CORES = within_quota(TORCH_CORES, cpu_quota())
"""Of these as many as a container's quota lets run side by side."""


def resolve_device(device: str, backend: str = "auto") -> str:
    """``auto`` becomes ``cuda`` where the Triton kernels can run, else ``cpu``."""
    if device != "auto":
        return device
    return "cpu" if backend == "native" or why_no_kernels() else "cuda"


def resolve_precision(precision: str, device: torch.device | str, backend: str = "auto") -> str:
    """``auto`` becomes the faster of ``bf16`` and ``fp32``: on a CPU the one that measures so, on a
    GPU ``bf16`` where its tensor cores have it."""
    if precision != "auto":
        return precision
    device = torch.device(device)
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return faster_precision(backend)


def bound_threads() -> None:
    """Let torch compute on no more threads than ``CORES``, where it counts more."""
    if CORES < TORCH_CORES:
        torch.set_num_threads(CORES)


def resolve_threads(config: Config, device: str) -> int:
    """How many CPU threads learn; see :func:`fastdreamer.machine.cores.learner_threads` for 0."""
    if config.threads:
        return config.threads
    ours = config.backend == "native" or (config.backend == "auto" and why_slow() is None)
    ours = ours and DECODE.why_not("native", "cpu") is None
    convolutions = config.env.obs != "state" and device == "cpu" and not ours
    return learner_threads(CORES, convolutions)


def resolve_config(config: Config) -> Config:
    """Return the settings with a device that exists, a precision instead of ``auto``, and a number
    of threads.

    Raises:
        ConfigError: backend and device contradict each other.
        BackendError: the backend or the device cannot run here.
    """
    backend, device = config.backend, config.device
    if backend == "triton" and device == "cpu" and not interpreting():
        raise ConfigError(
            "backend 'triton' runs on a GPU and device is 'cpu': "
            "take --device auto or cuda, or another --backend"
        )
    if backend == "native" and device.startswith("cuda"):
        raise ConfigError(
            f"backend 'native' runs on the CPU and device is {device!r}: "
            "take --device auto or cpu, or another --backend"
        )
    device = resolve_device(device, backend)
    if backend == "triton" and device == "cpu" and not interpreting():
        check_backend(backend, "cuda")  # raises, and says why there is no GPU to run on
    check_backend(backend, device)
    precision = resolve_precision(config.precision, device, backend)
    threads = resolve_threads(config, device)
    return dataclasses.replace(config, device=device, precision=precision, threads=threads)


def describe_choice(config: Config) -> dict[str, str | int | None]:
    """What every ``auto`` of a configuration means here, for a reader.

    Returns:
        ``device``, ``precision``, ``threads`` and ``backend``, each with the reason where it is
        not the fast one, and the native core's ``kernels``, None where another backend computes.
    """
    config = resolve_config(config)
    choice = native_kernels(config)
    return {
        "device": describe_device(config.device),
        "precision": config.precision,
        "threads": config.threads,
        "backend": _backend_of(config),
        "kernels": describe_kernels(choice) if choice else None,
    }


def native_kernels(config: Config) -> dict[str, str] | None:
    """The :func:`kernel_choice` that a resolved configuration computes with, None where another
    backend computes."""
    return kernel_choice() if _backend_of(config) == "native" else None


def _backend_of(config: Config) -> str:
    return chosen_backend(config.device) if config.backend == "auto" else config.backend


def describe_device(device: str) -> str:
    """The device for a reader: a GPU with its name, the CPU with why no GPU is used."""
    if device != "cpu":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if not torch.cuda.is_available():
        return device
    if reason := why_no_kernels():
        return f"cpu (not on the GPU: {reason})"
    return "cpu (there is a GPU: --device cuda takes it)"

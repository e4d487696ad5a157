"""``fastdreamer doctor``: what this machine offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from fastdreamer.machine import doctor


@dataclass
class Doctor:
    """Say what this machine offers and which backend each op would take, and why not the others."""


def run_doctor(command: Doctor, say: Callable[[str], None]) -> None:
    doctor.report(Console())

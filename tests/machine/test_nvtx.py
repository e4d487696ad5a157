"""Ranges for profilers, with the nvtx package and without it."""

from __future__ import annotations

import importlib
import sys

import torch

from fastdreamer.machine import nvtx


def test_ranges_are_the_nvtx_packages(monkeypatch):
    import nvtx as package

    assert nvtx.annotate is package.annotate
    with nvtx.annotate("a range"):
        pass


def test_without_the_package_torch_has_them(monkeypatch):
    opened = []
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: opened.append(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: opened.append("end"))
    try:
        bare = importlib.reload(nvtx).annotate
        monkeypatch.setattr(torch.version, "cuda", None)
        with bare("nothing"):
            pass
        assert not opened
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        with bare("a range"):
            opened.append("work")
        assert opened == ["a range", "work", "end"]
    finally:
        monkeypatch.undo()
        importlib.reload(nvtx)

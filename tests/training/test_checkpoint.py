"""Checkpoints: whole or absent, verified when read, never unpickled."""

import ast
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import fastdreamer
from fastdreamer.training import checkpoint
from fastdreamer.training.checkpoint import (
    CheckpointError,
    checkpoint_path,
    flatten_optimizer,
    list_checkpoints,
    list_snapshots,
    load_checkpoint,
    load_meta,
    load_newest,
    prune,
    restore_optimizer,
    save_checkpoint,
    snapshot_path,
    thin,
)

META = {"cursor": {"update": 7, "best": -1.5, "none": None}, "rng": [2**127 + 1, "x"], "ü": True}


def some_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "agent/w": draw(3, 4),
        "agent/b": draw(4).to(torch.bfloat16),
        "agent/transposed": draw(2, 5).T,
        "agent/scalar": torch.tensor(1.25),
        "agent/empty": torch.zeros(0, 3),
        "counts": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "generators/update": generator.get_state(),
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


def saved(directory, update, seed=0):
    path = checkpoint_path(directory, update)
    save_checkpoint(path, some_tensors(seed), META | {"update": update})
    return path


def test_what_is_saved_is_loaded(tmp_path):
    path = checkpoint_path(tmp_path / "new" / "place", 12)
    assert path.name == "checkpoint-000000012.safetensors"
    save_checkpoint(path, some_tensors(), META)
    tensors, meta = load_checkpoint(path)
    assert same(tensors, some_tensors())
    assert meta == META == load_meta(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_resaved_checkpoint_replaces_the_old_one(tmp_path):
    saved(tmp_path, 3, seed=0)
    path = saved(tmp_path, 3, seed=1)
    assert same(load_checkpoint(path)[0], some_tensors(1))


def test_truncated_anywhere_is_named(tmp_path):
    path = saved(tmp_path, 1)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    lengths = {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(content) - 1}
    for length in sorted(lengths | set(range(0, len(content), 97))):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="checkpoint-000000001.*damaged checkpoint"):
            load_checkpoint(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        load_checkpoint(path)


def test_any_flipped_bit_is_noticed(tmp_path):
    """In the tensors, their names and shapes, the JSON document: what loads is what was saved."""
    path = saved(tmp_path, 1)
    content = bytearray(path.read_bytes())
    want = load_checkpoint(path)
    header = 8 + int.from_bytes(content[:8], "little")
    unnoticed = []
    for position in [*range(header), *range(header, len(content), 13)]:
        flipped = content.copy()
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            tensors, meta = load_checkpoint(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            continue
        # The format has slack (white space): harmless if nothing differs.
        if not same(tensors, want[0]) or meta != want[1]:
            unnoticed.append(position)
    assert unnoticed == []


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(tmp_path, content):
    path = checkpoint_path(tmp_path, 1)
    for start in (b"", len(content).to_bytes(8, "little")):
        path.write_bytes(start + content)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def test_foreign_and_missing_files_are_refused(tmp_path):
    path = checkpoint_path(tmp_path, 1)
    for load in (load_checkpoint, load_meta):
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            load(path)
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            load(tmp_path)  # a directory
    for metadata in (None, {"format": "pt"}, {"format": "fastdreamer-checkpoint-0"}):
        save_file({"w": torch.zeros(2)}, path, metadata=metadata)
        for load in (load_checkpoint, load_meta):
            with pytest.raises(CheckpointError, match="000000001.*not a fastdreamer checkpoint"):
                load(path)
    for metadata in ({}, {"meta": "{}"}, {"crc32": "0"}, {"meta": "{}", "crc32": "zero"}):
        save_file({"w": torch.zeros(2)}, path, metadata={"format": checkpoint.FORMAT, **metadata})
        with pytest.raises(CheckpointError, match="000000001.*damaged checkpoint"):
            load_checkpoint(path)
    torch.save({"w": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        load_checkpoint(path)


def test_newest_is_taken_and_damaged_ones_are_named(tmp_path, caplog):
    assert load_newest(tmp_path / "absent") is None
    assert load_newest(tmp_path) is None
    paths = [saved(tmp_path, update) for update in (9, 10, 100)]
    (tmp_path / "checkpoint-7.safetensors").write_bytes(b"not one of ours")
    (tmp_path / ".tmp-1-checkpoint-000000200.safetensors").write_bytes(b"unfinished")
    assert list_checkpoints(tmp_path) == paths
    path, tensors, meta = load_newest(tmp_path)
    assert path == paths[2] and meta["update"] == 100 and same(tensors, some_tensors())
    assert not caplog.records

    with caplog.at_level(logging.WARNING, "fastdreamer"):
        os.truncate(paths[2], 500)
        assert load_newest(tmp_path)[0] == paths[1]
        assert [r.getMessage().split(":")[0] for r in caplog.records] == [str(paths[2])]
        assert "trying the one before" in caplog.text
        paths[1].write_bytes(b"")
        assert load_newest(tmp_path)[0] == paths[0]
        torch.save({}, paths[0])
        with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
            load_newest(tmp_path)
    assert all(str(path) in caplog.text for path in paths)


@pytest.mark.parametrize("failing", ["save_file", "fsync", "replace"])
def test_a_failed_save_leaves_everything_as_it_was(tmp_path, monkeypatch, failing):
    first, second = saved(tmp_path, 1), saved(tmp_path, 2)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(source, *args, **kwargs):
        if failing == "save_file":
            Path(args[0]).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint if failing == "save_file" else os, failing, fail)
    for update in (2, 3):  # an existing name and a new one
        with pytest.raises(OSError, match="No space left"):
            saved(tmp_path, update, seed=1)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    monkeypatch.undo()
    assert load_newest(tmp_path)[0] == second
    assert same(load_checkpoint(first)[0], some_tensors())


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from fastdreamer.training import checkpoint
setattr({module}, "{name}", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
checkpoint.save_checkpoint(checkpoint.checkpoint_path(Path(sys.argv[1]), 2), {{"w": torch.ones(9)}}, {{}})
"""  # noqa: E501


def test_a_kill_before_the_rename_leaves_the_old_one_and_a_leftover_that_goes(tmp_path):
    first = saved(tmp_path, 1)
    code = KILLED.format(module="os", name="replace")
    process = subprocess.run([sys.executable, "-c", code, tmp_path])
    assert process.returncode == -9
    assert list_checkpoints(tmp_path) == [first] and len(list(tmp_path.iterdir())) == 2
    second = saved(tmp_path, 2)
    assert prune(tmp_path, second, keep=5) == [first, second]
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_prune_keeps_the_newest_and_what_is_not_ours(tmp_path):
    paths = [saved(tmp_path, update) for update in range(1, 7)]
    foreign = tmp_path / "checkpoint-best.safetensors"
    foreign.write_bytes(b"the user's")
    # 5 was just saved, 6 is of a future that damage has undone.
    assert prune(tmp_path, paths[4], keep=3) == paths[2:5]
    assert sorted(tmp_path.iterdir()) == [*paths[2:5], foreign]
    assert prune(tmp_path, paths[4], keep=1) == [paths[4]]
    assert sorted(tmp_path.iterdir()) == [paths[4], foreign]


def test_thinned_snapshots_are_spread_evenly_and_the_newest_stays(tmp_path):
    (tmp_path / "snapshot-best.safetensors").write_bytes(b"the user's")
    left = {}
    for frames in range(1000, 20_500, 1000):
        snapshot_path(tmp_path, frames).touch()
        kept = thin(tmp_path, 2000, keep=4)
        assert kept == list(list_snapshots(tmp_path).values()) and len(kept) <= 4
        left[frames] = list(list_snapshots(tmp_path))
    assert left[2000] == [1000, 2000]
    assert left[4000] == [1000, 2000, 3000, 4000]
    assert left[5000] == [2000, 4000, 5000]
    assert left[8000] == [2000, 4000, 6000, 8000]
    assert left[10_000] == [4000, 8000, 9000, 10_000]
    assert left[20_000] == [8000, 16_000, 18_000, 20_000]
    assert (tmp_path / "snapshot-best.safetensors").exists()


@pytest.mark.parametrize("every", [0, 7, 1000])
@pytest.mark.parametrize("keep", [2, 3, 10])
def test_thinning_ends_whatever_the_frames_are(tmp_path, every, keep):
    frames = [1, 2, 3, 500, 501, 1999, 2000, 123_456]
    for at in frames:
        snapshot_path(tmp_path, at).touch()
        assert thin(tmp_path, every, keep)[-1] == snapshot_path(tmp_path, at)
        assert len(list_snapshots(tmp_path)) <= keep
    assert list_snapshots(tmp_path / "none") == {} and thin(tmp_path / "none", every, keep) == []


@pytest.mark.parametrize("fused", [False, True])
def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path, fused):
    """Twelve parameters: "10.step" must not be taken for the one behind "1.step".

    Two are not contiguous, as weights of convolutions; a file knows of no strides, a fused kernel
    of nothing else.
    """

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        params = [draw(k + 1, 3) for k in range(10)]
        params += [draw(3, 5).T, draw(4, 3, 2, 2).to(memory_format=torch.channels_last)]
        for p in params:
            p.requires_grad_()
        return params, torch.optim.Adam(params, lr=0.01, fused=fused)

    def steps(params, optimizer, numbers):
        for n in numbers:
            generator = torch.Generator().manual_seed(n)
            for p in params:
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            optimizer.step()

    params, optimizer = make(0)
    steps(params, optimizer, range(3))
    path = checkpoint_path(tmp_path, 3)
    state = flatten_optimizer(optimizer)
    assert len(state) == 36 and state["11.exp_avg"].shape == (4, 3, 2, 2)
    save_checkpoint(path, state | {f"p{k}": p for k, p in enumerate(params)}, {})

    resumed, other = make(1)
    other.param_groups[0]["lr"] = 0.02  # a setting changed on resumption stands
    tensors, _ = load_checkpoint(path)
    with torch.no_grad():
        for k, p in enumerate(resumed):
            p.copy_(tensors.pop(f"p{k}"))
    restore_optimizer(other, tensors)
    assert same(flatten_optimizer(other), flatten_optimizer(optimizer))
    for p, slot in other.state.items():
        assert slot["exp_avg"].stride() == slot["exp_avg_sq"].stride() == p.stride()
    assert other.param_groups[0]["lr"] == 0.02
    other.param_groups[0]["lr"] = 0.01
    steps(params, optimizer, range(3, 6))
    steps(resumed, other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))
    assert same(flatten_optimizer(other), flatten_optimizer(optimizer))


def test_an_optimizer_without_steps_has_no_state():
    optimizer = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
    assert flatten_optimizer(optimizer) == {}
    restore_optimizer(optimizer, {})
    assert flatten_optimizer(optimizer) == {}


UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unpickling(tree):
    """Lines of a module that could unpickle: the import of a pickler, or a loader that may."""
    found = []
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            names = {alias.name for alias in node.names}
            if (node.module, True) in {("torch", "load" in names), ("numpy", "load" in names)}:
                found.append(node.lineno)
        found += [node.lineno for m in modules if m.split(".")[0] in UNPICKLERS]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            keywords = {k.arg for k in node.keywords}
            # A connection's recv() unpickles, recv_bytes() does not.
            if (
                (node.func.attr == "load" and owner in ("torch", "np", "numpy", "torch.jit"))
                or "allow_pickle" in keywords
                or (node.func.attr == "recv" and not node.args)
            ):
                found.append(node.lineno)
    return found


def test_nothing_in_the_package_unpickles():
    for code in (
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "np.load('x')",
        "connection.recv()",
        "f('x', allow_pickle=True); g.h('x', allow_pickle=True)",
    ):
        assert unpickling(ast.parse(code)), code
    package = Path(fastdreamer.__path__[0])
    sources = sorted(package.rglob("*.py"))
    assert len(sources) > 15
    found = {
        f"{path.relative_to(package)}:{line}"
        for path in sources
        for line in unpickling(ast.parse(path.read_text()))
    }
    assert found == set()

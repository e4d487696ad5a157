"""Fake episodes, forged files and other inputs of the tests of episodes and replay."""

import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np

from fastdreamer.training import episodes as episodes_module
from fastdreamer.training.episodes import write_episode
from fastdreamer.training.replay import Replay

FIELDS = {
    "action": (np.float32, (2,)),
    "reward": (np.float32, ()),
    "terminated": (np.bool_, ()),
    "pixels": (np.uint8, (4, 5, 3)),
}
TASK = {"env_frames": 20, "task": "walker-walk"}


def episode(length=11, seed=0, size=(4, 5), state=0):
    """A fake episode whose reward says which episode and step it is: seed + step / 1000."""
    rng = np.random.default_rng(seed)
    arrays = {
        "action": rng.uniform(-1, 1, (length, 2)).astype(np.float32),
        "reward": (seed + np.arange(length) / 1000).astype(np.float32),
        "terminated": np.zeros(length, np.bool_),
        "pixels": rng.integers(0, 256, (length, *size, 3), dtype=np.uint8),
    }
    arrays["action"][0] = arrays["reward"][0] = 0
    if state:
        arrays["state"] = rng.standard_normal((length, state)).astype(np.float32)
    return arrays


def fill(directory, lengths, capacity=10**9, **kwargs):
    """Write one episode per length, 2 env frames a decision, and return the replay with them."""
    directory.mkdir(exist_ok=True)
    replay = Replay(directory, capacity=capacity, fields=FIELDS, **kwargs)
    for i, length in enumerate(lengths):
        meta = TASK | {"env_frames": 2 * (length - 1)}
        write_episode(directory, i, episode(length, seed=i), meta)
        replay.add(i)
    return replay


def forge(header, data, record=None):
    """A file with this header and a checksum that fits: only checks of content can refuse it."""
    header = dict(header)
    if record is not None:
        text = json.dumps(record, separators=(",", ":"))
        header["__metadata__"] = {"fastdreamer_episode": text}
    text = json.dumps(header, separators=(",", ":")).encode()
    match = re.search(rb'crc32\\":\\"([0-9a-f]{8})', text)
    if match:
        zeroed = text[: match.start(1)] + b"0" * 8 + text[match.end(1) :]
        crc = zlib.crc32(len(text).to_bytes(8, "little") + zeroed + data)
        text = text[: match.start(1)] + b"%08x" % crc + text[match.end(1) :]
    return len(text).to_bytes(8, "little") + text + data


def parts(path):
    """Header, record and data section of an episode file."""
    blob = path.read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:start])
    return header, json.loads(header["__metadata__"]["fastdreamer_episode"]), blob[start:]


def assert_same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def run_python(code, *args):
    paths = [str(Path(episodes_module.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        check=False,
        text=True,
    )

"""Episodes: what goes in comes out, and nothing damaged, forged or half written is taken."""

import contextlib
import errno
import logging
import os
import re
import signal
import stat
import time
from pathlib import Path

import numpy as np
import pytest
from episode_files import (
    FIELDS,
    TASK,
    assert_same,
    episode,
    fill,
    forge,
    parts,
    run_python,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fastdreamer.training import episodes as episodes_module
from fastdreamer.training.episodes import EPISODE_GLOB, EpisodeError, read_episode, write_episode
from fastdreamer.training.replay import Replay

# ---------------------------------------------------------------------------- one file


@pytest.mark.parametrize("state", [0, 7])
def test_roundtrip(tmp_path, state):
    arrays = episode(state=state)
    arrays["terminated"][-1] = True
    meta = TASK | {"return": 12.5, "random": True, "note": 'é "crc32":"00000000" \\"'}
    path = write_episode(tmp_path, 7, arrays, meta)
    assert path == tmp_path / "episode-000007.safetensors"
    assert os.listdir(tmp_path) == [path.name]
    found, found_meta = read_episode(path)
    assert_same(found, arrays)
    assert found_meta == meta
    assert_same(load_file(path), arrays)  # any safetensors reader can open it


def test_same_episode_is_same_bytes_also_from_another_process(tmp_path):
    path = write_episode(tmp_path, 0, episode(), TASK)
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from test_episodes import *;"
        "write_episode(sys.argv[1], 1, episode(), TASK)"
    )
    run_python(code, tmp_path, Path(__file__).parent)
    assert (tmp_path / "episode-000001.safetensors").read_bytes() == path.read_bytes()


def test_non_contiguous_arrays_are_written_in_order(tmp_path):
    arrays = episode(21)
    arrays = {name: np.asfortranarray(array)[::2] for name, array in arrays.items()}
    found, _ = read_episode(write_episode(tmp_path, 0, arrays, TASK))
    assert_same(found, arrays)


def test_existing_file_is_replaced(tmp_path):
    write_episode(tmp_path, 0, episode(seed=1), TASK)
    path = write_episode(tmp_path, 0, episode(5, seed=2), TASK)
    assert_same(read_episode(path)[0], episode(5, seed=2))


def changed(**changes):
    arrays = episode()
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    return {name: array for name, array in arrays.items() if array is not None}


def with_value(index, value):
    def change(array):
        array[index] = value
        return array

    return change


BAD_ARRAYS = {
    "lacks reward": changed(reward=lambda a: None),
    "lacks pixels or state": changed(pixels=lambda a: None),
    "unknown field 'frames'": episode() | {"frames": np.zeros(11, np.uint8)},
    "pixels must be uint8": changed(pixels=lambda a: a.astype(np.float32)),
    "action must be float32": changed(action=lambda a: a.astype(np.float64)),
    "reward must be float32": changed(reward=lambda a: a.astype(">f4")),
    "terminated must be bool": changed(terminated=lambda a: a.astype(np.uint8)),
    "reward must be float32 with 1": changed(reward=lambda a: a[:, None]),
    "pixels must be .T, h, w, 3.": changed(pixels=lambda a: a.repeat(2, -1)),
    "one length T": changed(reward=lambda a: a[1:]),
    "T of at least 2": {name: array[:1] for name, array in episode().items()},
    "action must be float32.*none empty": changed(action=lambda a: a[:, :0]),
    "reward has a value that is not finite": changed(reward=with_value(3, np.nan)),
    "action has a value that is not finite": changed(action=with_value((3, 1), np.inf)),
    "action and reward of step 0": changed(action=with_value((0, 1), 0.1)),
    "reward of step 0": changed(reward=with_value(0, 1)),
    "terminated must be 0": changed(terminated=with_value(4, True)),
}


@pytest.mark.parametrize("message", BAD_ARRAYS)
def test_bad_arrays_are_refused_before_anything_is_written(tmp_path, message):
    with pytest.raises(EpisodeError, match=f"episode-000003.*{message}"):
        write_episode(tmp_path, 3, BAD_ARRAYS[message], TASK)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"env_frames": 0},
        {"env_frames": True},
        {"env_frames": 1.0},
        {"env_frames": 1, "return": float("nan")},
        {"env_frames": 1, "x": np.float32(1)},
        {"env_frames": 1, "x": "x" * (1 << 20)},
        [1],
    ],
    ids=lambda meta: str(meta)[:40],
)
def test_bad_meta_is_refused(tmp_path, meta):
    with pytest.raises(EpisodeError, match="meta"):
        write_episode(tmp_path, 0, episode(), meta)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------- interrupted writes


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_write_leaves_the_old_episode_and_nothing_else(tmp_path, monkeypatch, call):
    path = write_episode(tmp_path, 0, episode(seed=1), TASK)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(episodes_module.os, call, fail)
    for index in 0, 1:
        with pytest.raises(OSError, match="No space"):
            write_episode(tmp_path, index, episode(seed=2), TASK)
    assert os.listdir(tmp_path) == [path.name]
    assert_same(read_episode(path)[0], episode(seed=1))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_file_system_that_syncs_no_directory_is_written_to(tmp_path, monkeypatch, number):
    """But where one fails at it, that is said."""
    fsync, files = os.fsync, []

    def sync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        files.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(episodes_module.os, "fsync", sync)
    failing = number == errno.EIO
    told = pytest.raises(OSError, match="Input/output") if failing else contextlib.nullcontext()
    with told:
        write_episode(tmp_path, 0, episode(), TASK)
    assert len(files) == 1 and len(list(tmp_path.glob(EPISODE_GLOB))) == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_kill_in_mid_write_leaves_no_half_episode(tmp_path, call):
    code = (
        "import sys, os, signal; sys.path.insert(0, sys.argv[2]); from test_episodes import *\n"
        "def kill(*args): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"os.{call} = kill\n"
        "write_episode(sys.argv[1], 0, episode(), TASK)"
    )
    assert run_python(code, tmp_path, Path(__file__).parent).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".tmp-")
    assert list(tmp_path.glob(EPISODE_GLOB)) == []
    replay = Replay(tmp_path, capacity=100, fields=FIELDS)
    assert os.listdir(tmp_path) == []
    assert replay.load() == [] and len(replay) == 0


def test_temporary_file_of_a_live_writer_stays_until_it_is_old(tmp_path):
    mine = tmp_path / f".tmp-{os.getpid()}-episode-000000.safetensors"
    endless = tmp_path / f".tmp-{10**30}-x"
    other = tmp_path / ".tmp-notours"
    for path in mine, endless, other:
        path.touch()
    Replay(tmp_path, capacity=1, fields=FIELDS)
    assert mine.exists() and other.exists() and not endless.exists()
    os.utime(mine, (time.time() - 7200,) * 2)
    Replay(tmp_path, capacity=1, fields=FIELDS)
    assert not mine.exists() and other.exists()


# ---------------------------------------------------------------------------- foreign and damaged


def test_foreign_and_damaged_files_are_named_and_skipped(tmp_path, caplog):
    replay = fill(tmp_path, [11, 11], task="walker-walk")
    foreign = {
        2: (episode(size=(8, 5)), TASK),
        3: (episode(state=3), TASK),
        4: (episode(), TASK | {"task": "walker-run"}),
    }
    for index, (arrays, meta) in foreign.items():
        write_episode(tmp_path, index, arrays, meta)
    damaged = write_episode(tmp_path, 5, episode(), TASK)
    blob = bytearray(damaged.read_bytes())
    blob[-1] ^= 1
    damaged.write_bytes(blob)
    header, record, data = parts(tmp_path / "episode-000000.safetensors")
    later = tmp_path / "episode-000006.safetensors"
    later.write_bytes(forge(header, data, record | {"version": 2}))
    plain = {name: entry for name, entry in header.items() if name != "__metadata__"}
    (tmp_path / "episode-000007.safetensors").write_bytes(forge(plain, data))
    (tmp_path / "episode-000008.safetensors").mkdir()
    os.mkfifo(tmp_path / "episode-000009.safetensors")
    (tmp_path / "episode-000010.safetensors").symlink_to("nowhere")
    (tmp_path / "episode-000011.safetensors").touch()
    (tmp_path / "episode-0000001.safetensors").touch()
    (tmp_path / "episode-x.safetensors").touch()
    reasons = {
        "episode-0000001.safetensors": "not named",
        "episode-x.safetensors": "not named",
        "episode-000002": "another environment: .*pixels uint8.8, 5, 3.*expected",
        "episode-000003": "another environment",
        "episode-000004": "task 'walker-run', expected 'walker-walk'",
        "episode-000005": "damaged",
        "episode-000006": "version 2",
        "episode-000007": "not an episode",
        "episode-000008": "not a regular file",
        "episode-000009": "not a regular file",
        "episode-000010": "No such file",
        "episode-000011": "cut short",
    }
    again = Replay(tmp_path, capacity=10**9, fields=FIELDS, task="walker-walk")
    with caplog.at_level(logging.WARNING, "fastdreamer"):
        warnings = again.load()
    assert again.indices == replay.indices == [0, 1]
    assert len(warnings) == len(reasons) == len(caplog.records)
    for warning, (name, reason) in zip(warnings, reasons.items(), strict=True):
        assert re.search(f"{name}.*{reason}", warning)
        assert warning in caplog.text
    (message,) = Replay(tmp_path, capacity=9, fields=FIELDS).load([77])
    assert "episode-000077" in message and "No such file" in message


def test_checksum_covers_the_header(tmp_path):
    path = write_episode(tmp_path, 0, episode(), TASK | {"return": 123.5})
    blob = path.read_bytes()
    assert blob.count(b"123.5") == 1
    path.write_bytes(blob.replace(b"123.5", b"923.5"))
    with pytest.raises(EpisodeError, match="damaged"):
        read_episode(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = write_episode(tmp_path_factory.mktemp("small"), 0, episode(3, size=(1, 2)), TASK)
    return path, path.read_bytes(), read_episode(path)


def read_or_refuse(path, blob):
    path.write_bytes(blob)
    try:
        return read_episode(path)
    except EpisodeError as error:
        assert str(path) in str(error)
        return None


fuzz = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def test_every_single_bit_flip_and_every_truncation_is_refused(tmp_path, small):
    _, blob, _ = small
    path = tmp_path / "x.safetensors"
    for i in range(len(blob)):
        flipped = bytearray(blob)
        flipped[i] ^= 1 << i % 8
        assert read_or_refuse(path, flipped) is None, i
        assert read_or_refuse(path, blob[:i]) is None, i
    assert read_or_refuse(path, blob + b"\0") is None


@fuzz
@given(st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=9)), min_size=1, max_size=4))
def test_fuzz_overwritten_bytes(tmp_path, small, edits):
    _, blob, expected = small
    mutated = bytearray(blob)
    for at, piece in edits:
        at %= len(blob)
        mutated[at : at + len(piece)] = piece[: len(blob) - at]
    found = read_or_refuse(tmp_path / "x.safetensors", mutated)
    if found is not None:
        assert_same(found[0], expected[0])
        assert found[1] == expected[1]


@fuzz
@given(st.binary(max_size=200), st.booleans())
def test_fuzz_random_bytes(tmp_path, data, sized):
    blob = len(data).to_bytes(8, "little") + data if sized else data
    assert read_or_refuse(tmp_path / "x.safetensors", blob) is None


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-4, 80),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(["F32", "U8", "BOOL", "F64", "I64", "", "\ud800"]),
    st.lists(st.integers(-1, 60), max_size=5),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)
targets = st.tuples(
    st.sampled_from(["action", "reward", "terminated", "pixels", "__metadata__", "state"]),
    st.sampled_from([None, "dtype", "shape", "data_offsets", "fastdreamer_episode", "x"]),
    st.sampled_from([None, 0, 1, -1]),
)


@fuzz
@given(st.lists(st.tuples(targets, values), min_size=1, max_size=3), st.binary(max_size=3))
def test_fuzz_header_with_a_checksum_that_fits(tmp_path, small, edits, tail):
    source, _, expected = small
    header, _, data = parts(source)
    for (name, key, place), value in edits:
        entry = header.get(name)
        if key is None or not isinstance(entry, dict):
            header[name] = value
        elif place is not None and isinstance(entry.get(key), list) and entry[key]:
            entry[key][place % len(entry[key])] = value
        else:
            entry[key] = value
    path = tmp_path / "x.safetensors"
    found = read_or_refuse(path, forge(header, data + tail))
    if found is not None:
        assert_same(found[0], load_file(path))
        assert found[1] == expected[1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reward": {"shape": [3], "data_offsets": [0, 12]}}, "expected at"),  # overlap
        ({"reward": {"shape": [3], "data_offsets": [10**9, 10**9 + 12]}}, "malformed"),
        ({"reward": {"shape": [3], "data_offsets": [36, 24]}}, "bytes, offsets"),
        ({"reward": {"shape": [2**62, 2**62, 4, 2**62, 4]}}, "malformed"),
        ({"reward": {"shape": [True] * 3}}, "malformed"),
        ({"terminated": {"shape": [2], "data_offsets": [54, 56]}}, "its header describes"),
        ({"reward": {"dtype": "F64"}}, "dtype 'F64'"),
        ({"reward": {"dtype": ["F32"]}}, "dtype"),
        ({"pixels": {"shape": [3, 2, 1, 3], "dtype": "BOOL"}}, "pixels must be uint8"),
    ],
)
def test_crafted_layouts_are_refused(tmp_path, small, change, message):
    header, _, data = parts(small[0])
    for name, entry in change.items():
        header[name] |= entry
    path = tmp_path / "x.safetensors"
    path.write_bytes(forge(header, data))
    with pytest.raises(EpisodeError, match=message):
        read_episode(path)


@pytest.mark.parametrize(
    "blob, message",
    [
        ((2**63).to_bytes(8, "little") + b"{}", "header of 9223372036854775808"),
        ((10**5).to_bytes(8, "little") + b"[" * 10**5, "header is not JSON"),
        ((6000).to_bytes(8, "little") + b"[" + b"9" * 5998 + b"]", "not an episode"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
    ],
    ids=["huge", "deep", "digits", "list"],
)
def test_hostile_headers_are_refused(tmp_path, blob, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob)
    with pytest.raises(EpisodeError, match=message):
        read_episode(path)

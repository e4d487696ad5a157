"""Replay: what goes in comes out, nothing else is ever sampled, and memory stays flat."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fastdreamer import episodes as episodes_module
from fastdreamer.episodes import EPISODE_GLOB, EpisodeError, read_episode, write_episode
from fastdreamer.replay import Replay

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
        "import sys; sys.path.insert(0, sys.argv[2]); from test_replay import *;"
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


def run_python(code, *args):
    paths = [str(Path(episodes_module.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        check=False,
        text=True,
    )


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_kill_in_mid_write_leaves_no_half_episode(tmp_path, call):
    code = (
        "import sys, os, signal; sys.path.insert(0, sys.argv[2]); from test_replay import *\n"
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


# ---------------------------------------------------------------------------- what is held


def test_counts_eviction_order_and_delayed_deletion(tmp_path):
    replay = fill(tmp_path, [11] * 4, capacity=60)
    assert replay.indices == [1, 2, 3]
    assert (len(replay), replay.num_episodes) == (3, 3)
    assert (replay.num_steps, replay.env_frames) == (33, 60)
    write_episode(tmp_path, 4, episode(31, seed=4), {"env_frames": 60})
    assert replay.add(4).length == 31
    assert replay.indices == [4]
    assert len(list(tmp_path.glob(EPISODE_GLOB))) == 5
    foreign = tmp_path / "episode-of-someone.safetensors"
    foreign.write_bytes(b"not ours to delete")
    replay.delete_before(2)  # the oldest that a checkpoint still refers to
    names = {f"episode-00000{i}.safetensors" for i in (2, 3, 4)}
    assert {path.name for path in tmp_path.iterdir()} == {*names, foreign.name}
    replay.delete_before(9)
    assert {path.name for path in tmp_path.iterdir()} == {max(names), foreign.name}
    assert set(replay.sample(4, 5, np.random.default_rng(0))["reward"][1:].round().flat) == {4}


def test_capacity_below_one_episode_keeps_the_newest(tmp_path):
    replay = fill(tmp_path, [11, 11, 31], capacity=1)
    assert replay.indices == [2] and replay.env_frames == 60


def test_held_episodes_are_not_deleted(tmp_path):
    replay = fill(tmp_path, [11, 11, 11], capacity=40)
    assert replay.indices == [1, 2]
    replay.capacity = 100
    replay.add(0)
    replay.delete_before(3)
    assert replay.indices == [0, 1, 2] and len(list(tmp_path.iterdir())) == 3


def test_load_restores_and_add_refuses_twice(tmp_path):
    replay = fill(tmp_path, [11, 21, 31])
    again = Replay(tmp_path, capacity=10**9, fields=FIELDS)
    assert again.load(range(3)) == []
    assert again.indices == replay.indices and again.env_frames == replay.env_frames
    everything = Replay(tmp_path, capacity=10**9, fields=FIELDS)
    assert everything.load() == [] and everything.indices == [0, 1, 2]
    with pytest.raises(ValueError, match="episode 1 is already held"):
        again.add(1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"capacity": 0, "fields": FIELDS},
        {"capacity": 9, "fields": {"action": FIELDS["action"]}},
        {"capacity": 9, "fields": FIELDS | {"pixels": (np.float32, (4, 5, 3))}},
    ],
)
def test_constructor_refuses(tmp_path, arguments):
    with pytest.raises(ValueError, match=r"replay.*(capacity|lacks|must be)"):
        Replay(tmp_path, **arguments)


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


# ---------------------------------------------------------------------------- sampling


def locate(batch):
    """Episode and step of every sampled step, as `episode` coded them in the reward."""
    code = np.rint(batch["reward"].astype(np.float64) * 1000).astype(int)
    return code // 1000, code % 1000


def test_samples_are_the_recorded_steps(tmp_path):
    lengths = [11, 15, 12]
    replay = fill(tmp_path, lengths)
    batch = replay.sample(40, 6, np.random.default_rng(1))
    assert {n: (a.shape, a.dtype) for n, a in batch.items()} == {
        **{n: ((6, 40, *shape), np.dtype(dtype)) for n, (dtype, shape) in FIELDS.items()},
        "is_first": ((6, 40), np.dtype(bool)),
    }
    assert batch["is_first"][0].all() and not batch["is_first"][1:].any()
    which, step = locate(batch)
    which, start = which[1], step[1] - 1  # step 0 of an episode has reward 0, so look at the next
    assert set(which) == {0, 1, 2}
    for b in range(40):
        source = episode(lengths[which[b]], seed=which[b])
        for name in FIELDS:
            expected = source[name][start[b] : start[b] + 6]
            np.testing.assert_array_equal(batch[name][:, b], expected)


def test_every_start_is_equally_likely(tmp_path):
    replay = fill(tmp_path, [10, 14, 30])
    batch = replay.sample(6000, 6, np.random.default_rng(2))
    which, step = locate(batch)
    seen = {}
    for key in zip(which[1], step[1] - 1, strict=True):
        seen[key] = seen.get(key, 0) + 1
    starts = {(i, s) for i, n in enumerate([5, 9, 25]) for s in range(n)}
    assert seen.keys() == starts
    expected = 6000 / len(starts)
    chi2 = sum((count - expected) ** 2 / expected for count in seen.values())
    assert chi2 < 70.7  # 99.9th percentile at 38 degrees of freedom


def test_short_episodes_go_on_with_another_and_a_reset(tmp_path):
    lengths = [3, 4, 11]
    replay = fill(tmp_path, lengths)
    sources = [episode(length, seed=i) for i, length in enumerate(lengths)]
    batch = replay.sample(100, 10, np.random.default_rng(3))
    followers = set()
    for b in range(100):
        firsts = np.flatnonzero(batch["is_first"][:, b])
        assert firsts[0] == 0
        previous = None
        for begin, end in zip(firsts, [*firsts[1:], 10], strict=True):
            count = end - begin
            (found,) = [
                (i, start)
                for i, source in enumerate(sources)
                for start in range(lengths[i] - count + 1)
                if all(
                    np.array_equal(batch[name][begin:end, b], source[name][start : start + count])
                    for name in FIELDS
                )
            ]
            which, start = found
            assert start == 0 or (begin == 0 and count == 10)
            assert end == 10 or count == lengths[which]  # left only at its end
            followers.add((previous, which))
            previous = which
    assert followers == {(before, after) for before in (None, 0, 1) for after in range(3)}


def test_one_step_sequences_reach_every_step(tmp_path):
    replay = fill(tmp_path, [3, 2])
    batch = replay.sample(200, 1, np.random.default_rng(4))
    assert len(np.unique(batch["pixels"][0].reshape(200, -1), axis=0)) == 5
    assert batch["is_first"].all()


def test_same_seed_and_episodes_give_the_same_batches(tmp_path):
    lengths = [9, 3, 12, 7]
    replay = fill(tmp_path / "a", lengths)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    other = Replay(tmp_path / "b", capacity=10**9, fields=dict(reversed(FIELDS.items())))
    other.load([2, 0, 3, 1])
    assert other.indices == [0, 1, 2, 3]
    rng, other_rng = np.random.default_rng(5), np.random.default_rng(5)
    batches = [replay.sample(8, 8, rng) for _ in range(3)]
    for batch in batches:
        assert_same(other.sample(8, 8, other_rng), batch)
    assert not np.array_equal(batches[0]["pixels"], batches[1]["pixels"])
    assert rng.bit_generator.state == other_rng.bit_generator.state


def test_out_is_filled_and_checked(tmp_path):
    replay = fill(tmp_path, [9, 12])
    expected = replay.sample(4, 5, np.random.default_rng(6))
    out = {name: np.full_like(array, 1) for name, array in expected.items()}
    result = replay.sample(4, 5, np.random.default_rng(6), out=out)
    assert all(result[name] is out[name] for name in out)
    assert_same(result, expected)
    with pytest.raises(ValueError, match="out must be .*is_first"):
        replay.sample(4, 6, np.random.default_rng(6), out=out)
    with pytest.raises(ValueError, match="must be positive"):
        replay.sample(0, 6, np.random.default_rng(6))


def test_empty_replay_says_so(tmp_path):
    with pytest.raises(EpisodeError, match="holds no episode"):
        Replay(tmp_path, capacity=1, fields=FIELDS).sample(1, 1, np.random.default_rng(0))


def cut(path):
    os.truncate(path, 600)  # within the pixels or before


def empty(path):
    os.truncate(path, 0)


def remove(path):
    path.unlink()


def flip_in_place(path):
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    with open(path, "r+b") as file:
        file.write(blob)
    os.utime(path, ns=(1, 1))  # as a later write would


def replace_by_other(path):
    write_episode(path.parent, 1, episode(20, seed=9), TASK)


@pytest.mark.parametrize("harm", [cut, empty, remove, flip_in_place, replace_by_other])
def test_file_harmed_after_load_is_named_and_dropped(tmp_path, caplog, harm):
    replay = fill(tmp_path, [12, 20, 12])
    harm(tmp_path / "episode-000001.safetensors")
    with caplog.at_level(logging.WARNING, "fastdreamer"):
        batch = replay.sample(30, 8, np.random.default_rng(7))
    assert replay.indices == [0, 2]
    assert set(locate(batch)[0][1:].flat) == {0, 2}
    (record,) = caplog.records
    assert "episode-000001" in record.getMessage()
    for index in 0, 2:
        cut(tmp_path / f"episode-{index:06d}.safetensors")
    with pytest.raises(EpisodeError, match="holds no episode"):
        replay.sample(30, 8, np.random.default_rng(7))


def test_touched_or_copied_file_with_the_same_data_stays(tmp_path, caplog):
    replay = fill(tmp_path, [12])
    path = tmp_path / "episode-000000.safetensors"
    shutil.copyfile(path, tmp_path / "copy")
    os.replace(tmp_path / "copy", path)
    replay.sample(3, 8, np.random.default_rng(8))
    assert replay.indices == [0] and not caplog.records


def test_file_cut_between_check_and_read_is_no_crash(tmp_path, monkeypatch):
    replay = fill(tmp_path, [12, 12])
    stamp = episodes_module._stamp

    def stamp_then_cut(file):
        result = stamp(file)
        if "000000" in str(file.name):
            cut(Path(file.name))
        return result

    monkeypatch.setattr(episodes_module, "_stamp", stamp_then_cut)
    batch = replay.sample(30, 8, np.random.default_rng(9))
    assert replay.indices == [1]
    assert (locate(batch)[0][1:] == 1).all()


MEMORY = """
import sys; sys.path.insert(0, sys.argv[2])
from test_replay import *
fields = FIELDS | {"pixels": (np.uint8, (64, 64, 3))}
rss = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
one, all_ = (Replay(sys.argv[1], capacity=10**9, fields=fields) for _ in range(2))
assert one.load(range(1)) == []
rng = np.random.default_rng(0)
out = one.sample(50, 50, rng)
for _ in range(5): one.sample(50, 50, rng, out)
before = rss()
assert all_.load() == [] and len(all_) == 100
for _ in range(12): all_.sample(50, 50, rng, out)
print(rss() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_resident_memory_is_flat_in_the_number_of_episodes(tmp_path):
    for i in range(100):  # 0.7 MB each, so that 70 MB would show
        write_episode(tmp_path, i, episode(60, seed=i, size=(64, 64)), TASK)
    result = run_python(MEMORY, tmp_path, Path(__file__).parent)
    assert result.returncode == 0
    assert int(result.stdout) < 4 << 20

"""Replay: nothing but what was recorded is ever sampled, and memory stays flat."""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from episode_files import (
    FIELDS,
    TASK,
    assert_same,
    episode,
    fill,
    run_python,
)

from fastdreamer.errors import ArgumentError
from fastdreamer.training import episodes as episodes_module
from fastdreamer.training.episodes import EPISODE_GLOB, EpisodeError, write_episode
from fastdreamer.training.replay import Replay

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


def test_damaged_and_foreign_episodes_are_not_deleted(tmp_path):
    """They are left to be looked at, whether they were so from the start, or became it after they
    had entered or left."""
    fill(tmp_path, [11] * 6, task="walker-walk")
    paths = [tmp_path / f"episode-00000{i}.safetensors" for i in range(6)]
    write_episode(tmp_path, 1, episode(11), TASK | {"task": "walker-run"})
    os.truncate(paths[0], 100)
    replay = Replay(tmp_path, capacity=60, fields=FIELDS, task="walker-walk")
    assert len(replay.load()) == 2 and replay.indices == [3, 4, 5]
    os.truncate(paths[3], 100)
    while replay.indices != [4, 5]:
        replay.sample(4, 5, np.random.default_rng(0))
    for again in (replay, Replay(tmp_path, capacity=60, fields=FIELDS, task="walker-walk")):
        if again is not replay:  # as a resumed run, whose checkpoint knows of those held alone
            again.load(replay.indices)
        again.delete_before(4)
        assert sorted(tmp_path.iterdir()) == [paths[i] for i in (0, 1, 3, 4, 5)]


def test_a_directory_that_is_not_there_is_not_made(tmp_path):
    (tmp_path / "file").touch()
    for name in ("typo", "file"):
        with pytest.raises(ArgumentError, match=f"{name} is no directory of episodes"):
            Replay(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_load_restores_and_add_refuses_twice(tmp_path):
    replay = fill(tmp_path, [11, 21, 31])
    again = Replay(tmp_path, capacity=10**9, fields=FIELDS)
    assert again.load(range(3)) == []
    assert again.indices == replay.indices and again.env_frames == replay.env_frames
    everything = Replay(tmp_path, capacity=10**9, fields=FIELDS)
    assert everything.load() == [] and everything.indices == [0, 1, 2]
    with pytest.raises(ValueError, match="episode 1 is already held"):
        again.add(1)


def test_without_fields_those_of_the_first_episode_count(tmp_path):
    fill(tmp_path, [11, 21])
    replay = Replay(tmp_path)
    with pytest.raises(EpisodeError, match="holds no episode to sample from"):
        replay.sample(2, 3, np.random.default_rng(0))
    assert replay.load() == [] and replay.indices == [0, 1]
    told = Replay(tmp_path, fields=FIELDS)
    told.load()
    same = [r.sample(4, 6, np.random.default_rng(3)) for r in (replay, told)]
    assert_same(*same)
    other = {n: a for n, a in episode(9, seed=2).items() if n != "pixels"}
    write_episode(tmp_path, 2, other | {"state": np.zeros((9, 2), np.float32)}, {"env_frames": 16})
    with pytest.raises(EpisodeError, match="is of another environment"):
        replay.add(2)


@pytest.mark.parametrize(
    ("meta", "found"),
    [
        ({"render": "opengl", "render_quality": "fast"}, None),
        ({"render_quality": "fast"}, None),  # of before there was another than OpenGL
        ({}, None),  # not a run's
        ({"render_quality": "full"}, "opengl in quality full"),
        ({"render": "rays", "render_quality": "fast"}, "rays in quality fast"),
    ],
)
def test_an_episode_drawn_otherwise_is_refused(tmp_path, meta, found):
    replay = fill(tmp_path, [11], drawn=("opengl", "fast"))
    write_episode(tmp_path, 1, episode(9, seed=1), TASK | meta)
    if found is None:
        replay.add(1)
        return
    with pytest.raises(EpisodeError, match=f"drawn by {found}, expected opengl in fast"):
        replay.add(1)
    (message,) = replay.load([1])
    assert "episode-000001" in message and replay.indices == [0]


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

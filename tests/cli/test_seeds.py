"""``fastdreamer train --seeds``: several runs of one setting, one after the other."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from fastdreamer import CheckpointError, load
from fastdreamer.cli import main
from fastdreamer.cli.seeds import is_finished, parse_seeds, runs_of
from fastdreamer.config import ConfigError, preset
from fastdreamer.training.checkpoint import list_checkpoints, load_checkpoint
from fastdreamer.training.logger import METRICS_FILE, read_metrics
from fastdreamer.training.trainer import (
    Stopped,
    Trainer,
    create_run,
    read_config,
    write_config,
)

TINY = ["--preset", "tiny", "--train.frames", "120", "--eval.every", "60"]


def returns(run_dir):
    return [line["return"] for line in read_metrics(run_dir, "episode")]


def output(capsys):
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of two seeds, the second interrupted in its middle."""
    folder = tmp_path_factory.mktemp("runs") / "seeds"
    train = Trainer.train

    def interrupted(self):
        if self.run_dir.name == "seed3":
            train(self, until=80)
            raise Stopped
        train(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", interrupted)
        assert main(["train", "walker", *TINY, "--seeds", "1,3", "--run", str(folder)]) == 130
    return folder


def test_seeds_go_on_where_they_stopped_and_end_in_one_picture(folder, tmp_path, capsys):
    one, three = runs_of(folder).values()
    assert [read_config(run).seed for run in (one, three)] == [1, 3]
    assert is_finished(one, read_config(one)) and not is_finished(three, read_config(three))
    assert not (folder / "curves.png").exists()
    kept = (one / METRICS_FILE).rename(tmp_path / METRICS_FILE)
    assert not is_finished(one, read_config(one)), "nothing says that it was evaluated"
    kept.rename(one / METRICS_FILE)
    before = (one / "metrics.jsonl").read_bytes()
    assert main(["train", "--resume", str(folder)]) == 0
    said = output(capsys)
    assert "seed 1 (1 of 2) has ended already" in said and "2 seeds: return" in said, said
    assert (one / "metrics.jsonl").read_bytes() == before
    assert is_finished(three, read_config(three)) and (folder / "curves.png").stat().st_size > 1000
    picture = ["--out", str(tmp_path / "both.svg")]
    assert main(["plot", str(folder), *picture, "--band"]) == 0
    assert "2 runs" in (tmp_path / "both.svg").read_text()
    assert main(["plot", str(folder), *picture, "--csv", str(tmp_path / "one.csv")]) == 1
    alone = tmp_path / "alone"
    assert main(["train", "walker", *TINY, "--seed", "3", "--run", str(alone)]) == 0
    assert returns(three) == returns(alone) != returns(one)


def test_a_folder_of_seeds_goes_on_with_other_settings(folder, capsys, monkeypatch):
    trained = []
    monkeypatch.setattr(Trainer, "train", lambda self: trained.append(self._asked))
    assert main(["train", "--resume", str(folder), "--train.frames", "200"]) == 0
    assert [(c.seed, c.train.frames) for c in trained] == [(1, 200), (3, 200)]


def test_a_seed_keeps_the_settings_that_it_alone_was_given(folder, monkeypatch):
    trained = []
    monkeypatch.setattr(Trainer, "train", lambda self: trained.append(self._asked))
    three = runs_of(folder)[3]
    before = (three / "config.json").read_text()
    write_config(three, dataclasses.replace(read_config(three), threads=7))
    try:
        assert main(["train", "--resume", str(folder), "--train.frames", "200"]) == 0
        assert [c.threads for c in trained] == [read_config(runs_of(folder)[1]).threads, 7]
        assert [c.train.frames for c in trained] == [200, 200]
        # Given, and equal to what one of them has already, it is the others' as well.
        own = [read_config(run).threads for run in runs_of(folder).values()]
        for threads in own:
            trained.clear()
            argv = ["train", "--resume", str(folder), "--train.frames", "200"]
            assert main([*argv, "--threads", str(threads)]) == 0
            assert [c.threads for c in trained] == [threads] * 2
        assert len({*own}) == 2
    finally:
        (three / "config.json").write_text(before)


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    folder, tmp_path, capsys
):
    shutil.copytree(folder, tmp_path / "seeds")
    one, three = runs_of(tmp_path / "seeds").values()
    *_, newest = list_checkpoints(one / "checkpoints")
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    assert not is_finished(one, read_config(one))
    assert main(["train", "--resume", str(tmp_path / "seeds")]) == 0
    said = output(capsys)
    assert "seed 1 (1 of 2) has ended already" not in said and "2 seeds: return" in said, said
    assert all(is_finished(run, read_config(run)) for run in (one, three))
    whole = runs_of(folder)[1]
    tensors, meta = load_checkpoint(whole / "checkpoints" / newest.name)
    again, same = load_checkpoint(newest)
    assert again.keys() == tensors.keys() and same == meta
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert returns(one) == returns(whole)


def test_a_run_of_the_folder_that_is_gone_is_missed(folder, capsys):
    three = runs_of(folder)[3]
    three.rename(folder / "elsewhere")
    try:
        assert main(["train", "--resume", str(folder)]) == 1
        assert "seed3" in output(capsys)
        with pytest.raises(CheckpointError, match="a folder of runs, name one of them.*seed1"):
            load(folder)
    finally:
        (folder / "elsewhere").rename(three)


def test_a_folder_of_runs_is_no_place_for_a_run(folder, capsys):
    before = sorted(folder.iterdir())
    assert main(["train", "walker", *TINY, "--run", str(folder)]) == 1
    assert f"{folder} is a folder of runs; `fastdreamer train --resume {folder}`" in output(capsys)
    assert sorted(folder.iterdir()) == before
    one, three = runs_of(folder).values()
    assert main(["report", str(folder)]) == 1
    assert f"it is a folder of runs, name one of them: {one}, {three}" in output(capsys)


@pytest.mark.parametrize(
    "argv",
    [
        ["eval", "."], ["dream", "."], ["watch", "."], ["report", "."], ["plot", "."],
        ["plot", "a", "."], ["export", ".", "x.safetensors"], ["train", "--resume", "."],
    ],
    ids=" ".join,
)  # fmt: skip
def test_where_one_run_is_meant_a_folder_of_others_names_them(argv, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        create_run(Path(name), preset("tiny"))
        (tmp_path / name / METRICS_FILE).touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(argv) == 1
    assert "; it is a folder of runs, name one of them: a, b" in output(capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("seeds", [[], ["--seeds", "0,1"]])
def test_runs_are_not_made_among_others(seeds, capsys, monkeypatch, tmp_path):
    """A folder of the new ones' own is; not even one of them is made where another would be."""
    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("trained"))
    create_run(tmp_path / "runs/seed1", preset("tiny"))
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", "walker", *TINY, *seeds, "--run", str(tmp_path / "runs")]) == 1
    said = output(capsys)
    assert f"{tmp_path / 'runs/seed1'}; choose" in said and "runs/NAME" in said, said
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_that_have_ended_say_how_to_go_on_to_more(folder, capsys, monkeypatch):
    trained = []
    monkeypatch.setattr(Trainer, "train", lambda self: trained.append(self._asked))
    one, three = runs_of(folder).values()
    frames = [load_checkpoint(list_checkpoints(r / "checkpoints")[-1])[1] for r in (one, three)]
    twice = [2 * meta["cursor"]["env_frames"] for meta in frames]
    for whole, more in ((one, twice[0]), (folder, max(twice))):
        before = (one / METRICS_FILE).read_bytes()
        assert main(["train", "--resume", str(whole)]) == 0
        said = capsys.readouterr().out
        (command,) = re.findall(r"go on to more with: fastdreamer (.*)", said)
        assert command == f"train --resume {whole} --train.frames {more}" and not trained
        assert (one / METRICS_FILE).read_bytes() == before
        assert main(shlex.split(command)) == 0
        assert {config.train.frames for config in trained} == {more}
        trained.clear()


def test_a_finished_folder_takes_no_settings_that_do_not_fit(folder, capsys):
    for wrong in (["--env.obs", "pixels"], ["--train.frames", "40"]):
        assert main(["train", "--resume", str(folder), *wrong]) == 1
        assert "seed1" in output(capsys)


def test_ctrl_c_before_the_trainer_begins_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def early(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", early)
    assert main(["train", "walker", *TINY, "--seeds", "0,1", "--run", str(tmp_path / "s")]) == 130
    assert f"go on with: fastdreamer train --resume {tmp_path / 's'}" in output(capsys)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["walker", "--seeds", "1,2", "--run", "{folder}"], "holds a run already, or several"),
        (
            ["walker", "--seeds", "1,2", "--run", "{folder}/seed1"],
            "holds a run already, or several",
        ),
        (["walker", "--seeds", "1,2", "--run", "{folder}/seeds.json"], "seeds.json is a file"),
        (["walker", "--run", "{folder}/seeds.json/run"], "seeds.json is a file"),
        (["walker", "--seeds", "1,2", "--seed", "3"], "--seed 3 and --seeds: give one of them"),
        (["--resume", "{folder}", "--seeds", "1,4"], "holds runs of the seeds 1, 3; --resume goes"),
        (["--resume", "{folder}", "--seed", "7"], "holds runs of the seeds 1, 3; --resume goes"),
        (["--resume", "{folder}", "--seed", "1"], "holds runs of the seeds 1, 3; --resume goes"),
        (["--resume", "{folder}/seed1", "--seeds", "1,4"], "--seeds makes new runs"),
        (["walker", "--seeds", "1;2"], "numbers with commas between them"),
        (["walker", "--seeds", "1,,2"], "numbers with commas between them"),
        (["walker", "--seeds", "2,2"], "differ from each other"),
        (["walker", "--seeds", "0,4294967296"], "seed must be < 2**32"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(folder, options, says, capsys, monkeypatch,
                                                       tmp_path):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("trained"))
    before = {run: (run / "config.json").read_text() for run in runs_of(folder).values()}
    argv = [option.format(folder=folder) for option in options]
    assert main(["train", *argv, *([] if "--resume" in argv else TINY)]) == 1
    assert says in output(capsys)
    assert not list(tmp_path.iterdir())
    assert before == {run: (run / "config.json").read_text() for run in before}


def test_seeds_are_read_in_their_order():
    assert parse_seeds("3,0, 12") == (3, 0, 12)
    with pytest.raises(ConfigError, match="got ''"):
        parse_seeds("")

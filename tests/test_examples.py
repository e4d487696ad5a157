"""The examples run as they stand, and the shell checks them."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastdreamer.cli import main
from fastdreamer.training.trainer import read_config

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_rollout():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "rollout.py"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    *losses, _ = [line for line in done.stdout.splitlines() if line.startswith("loss")] + [""]
    assert len(losses) == 3
    assert done.stdout.splitlines()[-1] == "agrees"


def test_train(tmp_path):
    """Trains, and called again finds nothing left to do; the batch is of what was collected."""
    command = [sys.executable, EXAMPLES / "train.py", tmp_path / "run", "tiny"]
    printed = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert "resumed from" not in printed[0] and "resumed from" in printed[1]
    *_, batch = printed[0].splitlines()
    assert "'state': (8, 16, 24)" in batch and "'action': (8, 16, 6)" in batch
    assert batch == printed[1].splitlines()[-1]
    assert read_config(tmp_path / "run").env.task == "walker-stand"


def test_a_script_that_trains_when_it_is_imported_is_told(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "import fastdreamer\nfastdreamer.Trainer('run', fastdreamer.preset('tiny')).train()\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert 'put what it does under `if __name__ == "__main__":`' in done.stderr
    assert "is being trained by another process" not in done.stderr


def test_bench_from_the_shell(monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES)
    assert main(["bench", "--module", "rollout:make", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "imagine: gradient of actor.0.weight" in out and out.strip().endswith("agrees")
    assert str(EXAMPLES) not in sys.path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rollout"], "must be PACKAGE.MODULE:FUNCTION, got 'rollout'"),
        (["no.such:make"], "no.such:make: No module named 'no', neither on Python's path nor in"),
        (["rollout:nothing"], "has no attribute 'nothing'"),
        (["rollout:WorldModel"], "WorldModel is no peer known here"),
        (["rollout:make", "--repeats", "0"], "--repeats must be at least 1"),
    ],
)
def test_bench_refuses(monkeypatch, capsys, argv, message):
    monkeypatch.chdir(EXAMPLES)
    assert main(["bench", "--module", *argv]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_bench_says_what_disagrees(monkeypatch, capsys, tmp_path):
    (tmp_path / "wrong_model.py").write_text(
        "import sys\nsys.path.insert(0, r'" + str(EXAMPLES) + "')\nimport copy, rollout\n"
        "def make():\n    made = rollout.make()\n    prior = made.nets['prior']\n"
        "    prior.given = copy.deepcopy(prior.given)\n    prior.given[0].reset_parameters()\n"
        "    return made\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["bench", "--module", "wrong_model:make", "--repeats", "1"]) == 1
    assert "does not agree" in capsys.readouterr().out


def test_torchrl_s_script_with_its_change():
    """The same model either way: losses agree but for the draws, and verify says so."""
    pytest.importorskip("torchrl", reason="the extra torchrl is not installed")
    found = []
    for flags in ([], ["--own"]):
        done = subprocess.run(
            [sys.executable, EXAMPLES / "torchrl_v3.py", *flags],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        found.append([float(line.split()[1]) for line in lines if line.startswith("loss")])
        assert flags or lines[-1] == "agrees"
    assert len(found[0]) == len(found[1]) == 3
    for ours, own in zip(*found, strict=True):
        assert ours == pytest.approx(own, rel=0.1)

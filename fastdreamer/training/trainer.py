"""A training run: the schedule, checkpoints, evaluation, and what becomes of a kill.

The schedule is a sequence of cycles. A cycle starts by handing the current weights to the
collector, does the updates that the newest round of episodes calls for (one episode, or several),
and ends by entering the collected round into replay, episode by episode. So episode k is collected
with the weights of a fixed update and enters replay at a fixed update, and a resumed run equals an
uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from fastdreamer._version import __version__
from fastdreamer.acting.parts import acting_weights
from fastdreamer.acting.play import run_backend
from fastdreamer.acting.signals import refuse_signal
from fastdreamer.config import (
    Config,
    ConfigError,
    architecture,
    differences,
    from_dict,
    to_dict,
)
from fastdreamer.envs import canonical_task, is_foreign
from fastdreamer.errors import ArgumentError, FastdreamerError
from fastdreamer.files import file_in_the_way, remove_stale, replacing
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.machine import nvtx
from fastdreamer.machine.cores import cpu_model
from fastdreamer.machine.device import describe_choice, resolve_config
from fastdreamer.named import names_code
from fastdreamer.ops.backend import (
    BackendError,
    describe_kernels,
    kernel_choice,
    settle_kernels,
)
from fastdreamer.training import checkpoint
from fastdreamer.training.cluster import connected
from fastdreamer.training.collector import Collector, Job, pool_size, read_job, round_size
from fastdreamer.training.episodes import episode_fields
from fastdreamer.training.logger import (
    METRICS_FILE,
    SEEDS_FILE,
    Logger,
    Progress,
    read_metrics,
)
from fastdreamer.training.processes import Processes
from fastdreamer.training.ranks import Lead, check_ranks, current
from fastdreamer.training.replay import Replay
from fastdreamer.training.worker import Result, by_optimism

_log = logging.getLogger("fastdreamer")


_SHOWN, _WATCHED = 3, 5
"""Of an open-loop prediction in TensorBoard: sequences, and steps watched before it."""
_PACED = 5
"""Updates after which a process that trains says how long it will take."""
_CHOSEN = "chosen"
"""The part of ``config.json`` that sets nothing."""
_CURSOR = (
    "update",
    "episodes",
    "env_frames",
    "newest_decisions",
    "newest_frames",
    "left",
    "best_return",
)


Loaded = tuple[Path, dict[str, Tensor], dict[str, Any]]
"""A checkpoint: its file, tensors and JSON document."""


class _Waits(NamedTuple):
    """Who waited for whom in a cycle, seconds."""

    collector: float  # the learner for the collector
    learner: float  # the collector, its round done, for the learner
    cycle: float  # all of it


class RunError(FastdreamerError, RuntimeError):
    """A run directory cannot be used as asked; the message says why and what would work."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM: the run can be resumed.

    saved: it goes on where it was; asked a second time, it left at once, and goes on at the newest
    checkpoint.
    """

    def __init__(self, *, saved: bool = True) -> None:
        super().__init__()
        self.saved = saved


def new_settings(config: Config) -> Config:
    """The settings of a run that starts here: the task's full name, whether its end is predicted,
    and what each ``auto`` that lasts came to.

    Raises:
        ConfigError: what cannot run, or contradicts itself. ArgumentError: no such task.
        BackendError: the backend or device cannot run here.
    """
    task, model = canonical_task(config.env.task), config.model
    if model.discount is None:
        model = replace(model, discount=is_foreign(task))
    config = replace(config, env=replace(config.env, task=task), model=model)
    return resolve_config(config.validate())


def create_run(run_dir: Path, config: Config) -> None:
    """Make a run directory with its ``config.json``.

    Raises:
        RunError: there is a run already, or several, or a file. BackendError: the backend or device
            cannot run here. ConfigError: they contradict each other.
    """
    config = resolve_config(config)  # a resumed run computes where this one does
    _refuse_used(run_dir)
    if file := file_in_the_way(run_dir):
        raise RunError(f"{run_dir} cannot be a run directory: {file} is a file")
    run_dir.mkdir(parents=True, exist_ok=True)
    with lock_run(run_dir):
        _refuse_used(run_dir)  # again: another process may have been quicker
        write_config(run_dir, config)


def _refuse_used(run_dir: Path) -> None:
    if (run_dir / "config.json").exists():
        raise RunError(
            f"{run_dir} holds a run already; resume it with `fastdreamer train --resume {run_dir}`,"
            " or choose another --run"
        )
    if (run_dir / SEEDS_FILE).exists():
        raise RunError(
            f"{run_dir} is a folder of runs; `fastdreamer train --resume {run_dir}` goes on with "
            "them, another --run makes a new one"
        )
    if runs := checkpoint.runs_in(run_dir):
        raise RunError(
            f"{run_dir} cannot be a run directory, it holds those of runs: "
            f"{', '.join(map(str, runs))}; choose one of its own, as --run {run_dir / 'NAME'}"
        )


def write_config(run_dir: Path, config: Config) -> None:
    """Write ``config.json`` atomically, with what ``auto`` means here for whoever reads it."""
    told = {**to_dict(config), _CHOSEN: describe_choice(config)}
    with replacing(run_dir / "config.json") as temporary:
        temporary.write_text(json.dumps(told, indent=2) + "\n")


def read_config(run_dir: Path) -> Config:
    """The configuration of a run.

    Raises:
        RunError: not a run directory, or its configuration is damaged.
    """
    path = run_dir / "config.json"
    if not path.is_file():
        hint = checkpoint.runs_within(run_dir)
        raise RunError(f"{run_dir} is not a run directory (no config.json){hint}")
    try:
        return from_dict(read_settings(path))
    except ConfigError as error:
        raise RunError(f"{path}: {error}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """What a ``config.json``, or a file like a part of one, sets; unchecked.

    Raises:
        ConfigError: no such file, or not a table of JSON.
    """
    try:
        told = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # of UTF-8 or of JSON
        raise ConfigError(f"not JSON: {error}") from error
    if not isinstance(told, dict):
        raise ConfigError(f"config must be a table of fields, got {told!r}")
    told.pop(_CHOSEN, None)
    return told


@contextlib.contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training this run; RunError where one does already, or where that
    cannot be known."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(run_dir / "lock", "w"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{run_dir} is being trained by another process") from None
        except OSError as error:  # nobody may write there, or its file system knows no locks
            raise RunError(f"{run_dir} cannot be locked: {error.strerror}") from error
        yield


def _filled(asked: Config, own: Config) -> Config:
    """Settings to go on with; what they leave open is what it came to when the run was made.

    Raises:
        ConfigError: what cannot run.
    """
    model = asked.model
    if model.discount is None:
        model = replace(model, discount=own.model.discount)
    return replace(
        asked,
        env=replace(asked.env, task=canonical_task(asked.env.task)),
        model=model,
        device=own.device if asked.device == "auto" else asked.device,
        precision=own.precision if asked.precision == "auto" else asked.precision,
        threads=asked.threads or own.threads,
    ).validate()


def _refuse_code(run_dir: Path, own: Config) -> None:
    """A file imports nothing by itself: whoever trusts it gives the settings as well."""
    how = "Trainer(run_dir, config)"
    if names_code(own.safety.signal):
        refuse_signal(own.safety, how)
    if names_code(own.env.task):
        raise ConfigError(
            f"{run_dir} names an environment of its owner's code, {own.env.task}, which is not "
            f"imported unasked: name it again by {how} if you trust it"
        )


def _take_kernels(meta: dict[str, Any]) -> None:
    """Compute with the kernels of a checkpoint that a CPU like this one wrote.

    They are chosen by a measurement, which may come out otherwise on busy cores. Others stay where
    the environment names them, and in a process that has chosen; ``_restore`` says so.
    """
    named = any(os.environ.get(name) for name in ("FASTDREAMER_ISA", "FASTDREAMER_ARITHMETIC"))
    if meta.get("cpu") == cpu_model() and not named:
        with contextlib.suppress(BackendError):
            settle_kernels(meta["kernels"])


class Trainer:
    """One run, from nothing or from wherever its newest checkpoint left it.

    Its collector is a process of its own, which imports the main module again: a script that
    trains has an ``if __name__ == "__main__":``.

    Args:
        run_dir: of a run, or where a new one goes.
        config: of a new run; of one that is there, settings to go on with in place of its own,
            which become its own when training starts, if they fit. What they leave open (``auto``,
            no threads, no discount) is as it came to when the run was made.
        ray: where a Ray cluster's nodes collect and evaluate instead of processes of this machine:
            auto, local or its address, see :func:`fastdreamer.training.cluster.connected`.

    Raises:
        RunError: not a run, and no settings for a new one, or this is the script as its collector
            imports it. Of a new one what ``new_settings`` does. ConfigError: settings that are no
            :class:`Config`.
    """

    def __init__(
        self, run_dir: str | os.PathLike, config: Config | None = None, *, ray: str | None = None
    ) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):  # as spawn itself asks
            raise RunError(
                "a process that collects imports the script that trains, which would train once "
                'more: put what it does under `if __name__ == "__main__":`'
            )
        if not isinstance(config, Config | None):
            raise ConfigError(
                f"Trainer takes a Config, as fastdreamer.preset() returns it, got {type(config)}"
            )
        self.run_dir = Path(run_dir)
        if config is not None and not (self.run_dir / "config.json").exists():
            create_run(self.run_dir, new_settings(config))
        self.config = read_config(self.run_dir)
        self._asked = config
        self._ray = ray
        self._lead = Lead(current())

    def train(self, until: int | None = None) -> None:
        """Train to the end of the schedule.

        Args:
            until: end where the schedule is at so many env frames, saved, at least 1; training from
                there on equals training in one go.

        Raises:
            ArgumentError: ``until`` is below 1.
            RunError: another process is training this run, its checkpoints are gone, or settings
                do not fit what it has learned; everything is as it was.
            BackendError: the backend or device cannot run here.
            ConfigError: settings cannot run or contradict each other, the ranks cannot learn that
                together, or the run's own name code of its owner's, which a file alone does not
                import.
            RankError: another process of a learner of several is gone.
            ClusterError: Ray cannot start, or there is no such cluster.
            CollectorError: a worker failed too often, or for good.
            DiskFullError: there is no room to write to.
            Stopped: a signal asked to stop; everything is saved. A second one leaves at once.
            NonFiniteLoss: a loss or gradient became NaN or infinite; the newest checkpoint stands.
        """
        if until is not None and until < 1:
            raise ArgumentError(f"until must be at least 1 env frame, got {until}")
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock_run(self.run_dir))
            self._stop = stack.enter_context(stop_signals())
            config, loaded = self._settle()
            self.config = config
            self._until = config.train.frames if until is None else min(until, config.train.frames)
            torch.set_num_threads(config.threads)
            stack.enter_context(run_backend(config))
            self._place = Processes()
            if self._ray is not None:
                self._place = stack.enter_context(connected(self._ray, config.collect.workers))
            self._open(stack, loaded)
            del loaded  # as large as all that learns
            self._run()

    # ----------------------------------------------------------------- set-up

    def _settle(self) -> tuple[Config, Loaded | None]:
        """The settings to go on with and the newest checkpoint; they fit each other and are kept.

        To be called under the lock: nothing is written before all is known to fit.
        """
        run_dir, own = self.run_dir, read_config(self.run_dir)
        if self._asked is None:
            _refuse_code(run_dir, own)
        loaded = checkpoint.load_newest(run_dir / "checkpoints")
        _refuse_lost(run_dir, own, loaded)
        if loaded is not None:
            _take_kernels(loaded[2])
        config = resolve_config(own if self._asked is None else _filled(self._asked, own))
        check_ranks(config)
        seed, learned = own.seed, architecture(own)
        if loaded is not None:
            _, _, meta = loaded
            # One of before it was written down has that of its own settings.
            learned = meta.get("architecture") or architecture(from_dict(meta["config"]))
            seed = meta["config"]["seed"]
            frames = meta["cursor"]["env_frames"]
            if config.train.frames < min(own.train.frames, frames):
                raise RunError(
                    f"{run_dir} has {frames} env frames already: there is nothing to do up to "
                    f"train.frames = {config.train.frames} (its own: {own.train.frames})"
                )
        wrong = differences(
            {"seed": seed, **learned}, {"seed": config.seed, **architecture(config)}
        )
        if wrong:
            raise RunError(
                f"{run_dir}: {'; '.join(wrong)}. What decides the networks, what they see and the "
                "random numbers is fixed when a run starts; make a new run to change it"
            )
        if config != own:
            write_config(run_dir, config)
        return config, loaded

    def _open(self, stack: contextlib.ExitStack, loaded: Loaded | None) -> None:
        """Build everything and put it where the newest checkpoint left it."""
        config, run_dir = self.config, self.run_dir
        kind = "pixels and state" if config.env.obs == "both" else config.env.obs
        self.progress = stack.enter_context(
            Progress(config.train.frames, title=f"{config.env.task} from {kind}")
        )
        chosen = describe_choice(config)
        by = f"{chosen['backend']}, {chosen['kernels']}" if chosen["kernels"] else chosen["backend"]
        self.progress.message(f"computing on {chosen['device']} in {config.precision} by {by}")
        plural = "s" if config.threads > 1 else ""
        ranks = self._lead.ranks.size
        each = f" in each of {ranks} processes" if ranks > 1 else ""
        self.progress.message(f"learning on {config.threads} CPU thread{plural}{each}")
        size, workers = round_size(config), pool_size(config, self._place.cores)
        if self._ray is not None:
            self.progress.message(f"collecting on {self._place.describe()}")
        if size > 1 or workers > 1:
            self.progress.message(
                f"collecting {size} episode{'s' if size > 1 else ''} a round by {workers} "
                f"worker{'s' if workers > 1 else ''}, {config.collect.envs} side by side"
            )
        self.progress.update(phase="starting the collector")
        self.collector = Collector(config, run_dir / "episodes", self._stop.check, self._place)
        stack.callback(self.collector.close)
        shapes, action_dim = self.collector.obs_shapes, self.collector.action_dim
        self.agent = Dreamer(config, shapes, action_dim, ranks=self._lead.ranks)
        if self.agent.guard is not None:
            _ = self.agent.guard.signal  # one that cannot be loaded is refused before anything else
        self.optimizers = self.agent.make_optimizers()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.sample_rng = np.random.default_rng(config.seed)
        for part in (run_dir, run_dir / "checkpoints", run_dir / "snapshots", run_dir / "videos"):
            if part.is_dir():
                remove_stale(part)
        episodes = run_dir / "episodes"
        episodes.mkdir(exist_ok=True)
        self.replay = Replay(
            episodes,
            capacity=config.replay.capacity,
            fields=episode_fields(shapes, action_dim),
            task=config.env.task,
            drawn=(config.env.render, config.env.render_quality) if "pixels" in shapes else None,
        )
        # The cursor: plain numbers that a checkpoint holds besides tensors.
        self.update = 0
        self.episodes = 0  # entered into replay so far
        self.env_frames = 0
        self.newest_decisions = self.newest_frames = 0  # of the round that entered last
        self.left = 0  # updates left in this cycle
        self.job: Job | None = None  # under way in the collector
        self.job_weights: dict[str, Tensor] = {}
        self.best_return = -np.inf
        self._waits: deque[_Waits] = deque(maxlen=20)
        lines = None
        if loaded is not None:
            lines = self._restore(*loaded)
            self.progress.update(env_frames=self.env_frames, updates=self.update)
        elif (run_dir / METRICS_FILE).exists():
            self.progress.message("stopped before its first checkpoint: begins again at update 0")
        self.logger = stack.enter_context(Logger(run_dir, resume_lines=lines))
        if self.job is not None:
            self._hand_over()
        self._lead.start(self.agent, self.optimizers, self.generator)

    def _restore(self, path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> int:
        """Load a checkpoint into everything; return how many lines of metrics it had written."""
        self._refuse_changed_task(meta)
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = value
        self._load_agent(groups["agent"])
        for name, optimizer in self.optimizers.items():
            # Saved before the first update, or before the run was given it, an optimiser has no
            # state yet.
            checkpoint.restore_optimizer(optimizer, groups.get(f"{name}_optimizer", {}))
        self.generator.set_state(groups["generators"]["update"])
        self.sample_rng.bit_generator.state = meta["sample_rng"]
        cursor = meta["cursor"]
        for name in _CURSOR:
            setattr(self, name, cursor[name])
        self.job = read_job(cursor["job"]) if cursor["job"] else None
        self.job_weights = groups.get("job_weights", {})
        if self.job is not None and self.job.video:  # the run may have moved since, or we have
            self.job = replace(self.job, video=self._video(Path(self.job.video).name))
        if self.job is not None and not self.job.random:
            needed = acting_weights(self.agent)
            if needed.keys() <= self.job_weights.keys():
                self.job_weights = {name: self.job_weights[name] for name in needed}
            else:  # others act than when it was begun, and they need more: all of one update
                self.job_weights, self.job = needed, replace(self.job, update=self.update)
        missing = self.replay.load(cursor["replay"])
        for warning in missing:
            self.progress.message(f"skipped: {warning}")
        self.progress.message(f"resumed from {path} at update {self.update}")
        before, here = meta.get("kernels"), kernel_choice()
        if before and here and before != here:
            there, here = describe_kernels(before), describe_kernels(here)
            self.progress.message(
                f"other kernels than when it was saved ({there}; now {here}): "
                "from here on not bit for bit as it would have been"
            )
        # Snapshots of a future that was lost come again.
        for frames, snapshot in checkpoint.list_snapshots(self.run_dir / "snapshots").items():
            if frames > self.env_frames:
                snapshot.unlink()
        return cursor["metric_lines"]

    def _refuse_changed_task(self, meta: dict[str, Any]) -> None:
        """Raise RunError where the task's observations or actions are no more what was learned."""
        learned = {kind: tuple(shape) for kind, shape in meta["obs_shapes"].items()}
        learned["action"] = (meta["action_dim"],)
        now = {**self.agent.obs_shapes, "action": (self.agent.action_dim,)}
        if learned != now:
            told = (", ".join(f"{k} {list(s)}" for k, s in each.items()) for each in (learned, now))
            raise RunError(
                f"{self.run_dir} has learned {self.config.env.task} of {next(told)}; the task has "
                f"now {next(told)}"
            )

    def _load_agent(self, weights: dict[str, Tensor]) -> None:
        """Load weights; an explorer or guard that the run has only now been given starts here."""
        for part in ("explorer.", "guard."):
            if not any(name.startswith(part) for name in weights):
                own = self.agent.state_dict()
                weights = weights | {n: v for n, v in own.items() if n.startswith(part)}
        self.agent.load_state_dict(weights)

    # --------------------------------------------------------------- schedule

    def _run(self) -> None:
        config = self.config
        started_at = speed_update = saved = self.update
        speed_from = None  # the clock of updates/s starts with the first update
        while True:
            while self.left == 0:
                if not self._next_cycle():
                    self._save()
                    self._finish()
                    return
                if self._stop.asked:
                    break
            if self._stop.asked:
                self._halt()
            if self.update - saved >= config.train.checkpoint_every:
                self._save()
                saved = self.update
            speed_from = speed_from or time.monotonic()
            with self._lead.updating():
                metrics = self._update()
            self.update += 1
            self.left -= 1
            now, done = time.monotonic(), self.update - started_at
            if self.update % config.train.log_every == 0 or done in (1, _PACED):
                speed = (self.update - speed_update) / max(now - speed_from, 1e-9)
                speed_from, speed_update = now, self.update
                if self.update % config.train.log_every == 0:
                    self._log("train", updates_per_s=speed, **metrics)
                losses = {n: v for n, v in metrics.items() if n.endswith("_loss") or n == "kl"}
                self.progress.update(losses=losses)
                if done > 1:  # the first one makes what all others use: it is no measure
                    left = self._seconds_left(speed)
                    self.progress.update(updates_per_s=speed, seconds_left=left)
            self.progress.update(updates=self.update)

    def _halt(self) -> NoReturn:
        """Save and stop. A job under way is dropped; resuming starts it again."""
        # Before the first update there is nothing to save but random episodes, which come again;
        # the final evaluation has the checkpoint that it started from.
        final = self.job is not None and not self.job.episodes
        if self.update and not final:
            self._save()
        raise Stopped

    def _update(self) -> dict[str, float]:
        """One batch from replay to new weights."""
        config = self.config
        with nvtx.annotate("data"):
            arrays = self.replay.sample(config.replay.batch, config.replay.length, self.sample_rng)
            health = (self.update + 1) % config.train.log_every == 0  # of what is logged
            pace = self._pace()
            batch = self._lead.deal(arrays, pace=pace, health=health)
            batch = {name: x.to(self.agent.device) for name, x in batch.items()}
        with nvtx.annotate("update"):
            self.agent.set_pace(self.optimizers, pace)
            metrics = self.agent.update(batch, self.optimizers, self.generator, health=health)
        every = config.behavior.target_every
        if every and (self.update + 1) % every == 0:
            self.agent.update_target()
            self._lead.update_target()
        return metrics

    def _pace(self) -> float:
        """Factor of the learning rates: 1, and a tenth of it where the run is to end."""
        anneal = self.config.optim.anneal
        if not anneal:
            return 1.0
        left = (self.config.train.frames - self.env_frames) / anneal
        return 0.1 + 0.9 * min(1.0, max(0.0, left))

    def _next_cycle(self) -> bool:
        """End a cycle and start the next; False when the run is complete."""
        config = self.config
        if self.job is not None:
            self._enter(self.job)
        if self.env_frames >= self._until:
            return False
        size, missing = round_size(config), config.collect.prefill - self.episodes
        if missing > 0:
            # The smaller round first: those behind it, which updates answer, are whole.
            self._submit(missing % size or size, random=True)
            self.progress.update(phase="collecting random episodes")
        elif self.update < config.train.pretrain:
            self.left = config.train.pretrain - self.update
            self.progress.update(phase="learning from the random episodes")
        else:
            self.left = max(1, round(self._updates_for(self.newest_decisions)))
            self._submit(size, evaluations=self._evaluations_due())
            self.progress.update(phase="learning")
        return True

    def _submit(self, size: int, *, random: bool = False, evaluations: int = 0) -> None:
        """Have the next so many episodes collected."""
        video = None
        if evaluations and self.config.eval.video and self.config.env.obs != "state":
            video = self._video(f"eval-{self.env_frames:09d}.mp4")
        episodes = list(range(self.episodes, self.episodes + size))
        self.job = Job(self.update, episodes, random, evaluations, video)
        self.job_weights = {} if random else acting_weights(self.agent)
        self._hand_over()
        if video:
            self._log_prediction()

    def _video(self, name: str) -> str:
        return str(self.run_dir / "videos" / name)

    def _hand_over(self) -> None:
        self._submitted = time.monotonic()
        self.collector.submit(self.job, self.job_weights)

    def _log_prediction(self) -> None:
        """Show in TensorBoard what the model predicts blindly, below what really happened.

        Its random numbers are its own, so that those of the updates stay as they are.
        """
        seeds = np.random.SeedSequence([self.config.seed, self.env_frames])
        sequence, latent = (int(s) for s in seeds.generate_state(2))
        batch = self.replay.sample(
            _SHOWN, self.config.replay.length, np.random.default_rng(sequence)
        )
        begins = np.flatnonzero(batch["is_first"][1:].any(1))
        length = int(begins[0]) + 1 if len(begins) else len(batch["is_first"])
        context = min(_WATCHED, length - 1)
        tensors = {k: torch.from_numpy(v[:length]).to(self.agent.device) for k, v in batch.items()}
        generator = torch.Generator().manual_seed(latent)
        predicted = self.agent.predict(tensors, context, generator)["pixels"]
        pair = np.concatenate([batch["pixels"][:length], predicted], 2)  # [T, B, 2h, w, 3]
        frames = np.concatenate(list(pair.swapaxes(0, 1)), 2)  # one sequence beside the other
        self.logger.log_video("eval/open_loop", frames, fps=10, env_frames=self.env_frames)

    def _evaluations_due(self) -> int:
        return self.config.eval.episodes if self._crossed(self.config.eval.every) else 0

    def _crossed(self, every: int) -> bool:
        """Whether this cycle is the first at or past a multiple of so many env frames; 0: never."""
        before = self.env_frames - self.newest_frames
        return bool(every) and self.env_frames // every > before // every

    def _enter(self, job: Job) -> None:
        """Wait for a job and take in what it brought."""
        with nvtx.annotate("wait for the collector"):
            result, waits = self._wait(job)
        self.job, self.job_weights = None, {}
        if result.eval_returns:
            self._log_evaluation(job, result.eval_returns, result.eval_safety)
        if not job.episodes:
            return
        before, self.newest_decisions = self.env_frames, 0
        told = {"wait_collector_s": waits.collector, "wait_learner_s": waits.learner}
        for played in result.played:
            info = self.replay.add(played.episode)
            self.episodes += 1
            self.env_frames += info.env_frames
            self.newest_decisions += info.length - 1
            value = played.episode_return
            self.best_return = max(self.best_return, value)
            if not job.random and by_optimism(self.config, played.episode):
                self.agent.explorer.rounds += 1
            values = {"return": value, "episode": played.episode, "random": int(job.random)}
            self._log("episode", **values, **told, **played.safety)
            told = {}  # once a round
        self.newest_frames = self.env_frames - before
        if not job.random:
            self._waits.append(waits)
        self.progress.update(
            env_frames=self.env_frames,
            last_return=value,
            best_return=self.best_return,
            waits=self._wait_shares(),
        )
        train = self.config.train
        final = self.env_frames >= train.frames
        if self.update and (final or self._crossed(train.snapshot_every)):
            self._save_snapshot()

    def _wait(self, job: Job) -> tuple[Result, _Waits]:
        """What a job brought, and who waited for whom."""
        start, arrived = time.monotonic(), time.time()
        ready = self.collector.ready(timeout=0)
        if not ready and job.episodes and not job.random:
            self.progress.update(phase=_waiting_for(job))
        while not ready:
            if self._stop.asked:
                self._halt()
            ready = self.collector.ready(timeout=0.2)
        now, result = time.monotonic(), self.collector.wait()
        cycle = now - self._submitted
        # No more than the cycle: by clocks of two machines, or by one that was set or has slept.
        learner = min(cycle, max(0.0, arrived - result.finished))
        return result, _Waits(now - start, learner, cycle)

    def _wait_shares(self) -> tuple[float, float] | None:
        """Shares of the late cycles' time in which the learner waited, and the collector."""
        whole = sum(waits.cycle for waits in self._waits)
        if not whole:
            return None
        learner = sum(waits.collector for waits in self._waits) / whole
        return learner, sum(waits.learner for waits in self._waits) / whole

    def _log_evaluation(self, job: Job, returns: list[float], safety: dict[str, float]) -> None:
        values = {
            "return_mean": float(np.mean(returns)),
            "return_std": float(np.std(returns)),
            "episodes": len(returns),
            **safety,
        }
        # The job started with this cycle: env_frames has not moved since, update has.
        self.logger.log("eval", env_frames=self.env_frames, update=job.update, **values)
        self.progress.update(eval_return=values["return_mean"])

    def _finish(self) -> None:
        """Evaluate the final weights."""
        if self.config.eval.every and self._until >= self.config.train.frames:
            self.progress.update(phase="evaluating the final weights")
            self._submit(0, evaluations=self.config.eval.episodes)
            self._enter(self.job)
        self.progress.update(phase="done", seconds_left=0.0)

    # ---------------------------------------------------------------- records

    def _log(self, kind: str, **values: float) -> None:
        self.logger.log(kind, env_frames=self.env_frames, update=self.update, **values)

    def _seconds_left(self, updates_per_s: float) -> float:
        """The rest's updates, and what the learner has waited for the collector in late cycles."""
        frames = max(0, self.config.train.frames - self.env_frames)
        updates = self._updates_for(frames / self.config.env.action_repeat)
        cycles = frames / max(1, self.newest_frames)
        waited = sum(waits.collector for waits in self._waits) / max(1, len(self._waits))
        return updates / updates_per_s + cycles * waited

    def _updates_for(self, decisions: float) -> float:
        """The updates that so many collected decisions call for."""
        replay = self.config.replay
        return self.config.train.replay_ratio * decisions / (replay.batch * replay.length)

    def _description(self) -> dict[str, Any]:
        """What a checkpoint says of the agent, for ``load``."""
        return {
            "version": __version__,
            "config": to_dict(self.config),
            "architecture": architecture(self.config),
            "obs_shapes": self.agent.obs_shapes,
            "action_dim": self.agent.action_dim,
            "kernels": kernel_choice(),
            "cpu": cpu_model(),
        }

    def _save_snapshot(self) -> None:
        """Keep the weights that the next cycle starts with, those that an evaluation here has."""
        directory, train = self.run_dir / "snapshots", self.config.train
        tensors = {f"agent/{k}": v for k, v in self.agent.state_dict().items()}
        cursor = {"update": self.update, "env_frames": self.env_frames}
        path = checkpoint.snapshot_path(directory, self.env_frames)
        checkpoint.save_checkpoint(path, tensors, {**self._description(), "cursor": cursor})
        checkpoint.thin(directory, train.snapshot_every, train.keep_snapshots)

    def _save(self) -> None:
        tensors = {f"agent/{k}": v for k, v in self.agent.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            state = checkpoint.flatten_optimizer(optimizer)
            tensors |= {f"{name}_optimizer/{k}": v for k, v in state.items()}
        tensors["generators/update"] = self.generator.get_state()
        tensors |= {f"job_weights/{k}": v for k, v in self.job_weights.items()}
        meta = {
            **self._description(),
            "sample_rng": self.sample_rng.bit_generator.state,
            "cursor": {
                **{name: getattr(self, name) for name in _CURSOR},
                "job": asdict(self.job) if self.job else None,
                "replay": self.replay.indices,
                "metric_lines": self.logger.lines,
            },
        }
        directory = self.run_dir / "checkpoints"
        self.logger.sync()
        path = checkpoint.checkpoint_path(directory, self.update)
        checkpoint.save_checkpoint(path, tensors, meta)
        kept = checkpoint.prune(directory, path, self.config.train.keep_checkpoints)
        self.replay.delete_before(_oldest_episode(kept))


def _waiting_for(job: Job) -> str:
    first, last = job.episodes[0] + 1, job.episodes[-1] + 1
    what = f"episode {first}" if first == last else f"episodes {first} to {last}"
    whose = "its" if first == last else "their"
    return f"waiting for {what}" + (f" and {whose} evaluation" if job.evaluations else "")


def _oldest_episode(checkpoints: list[Path]) -> int:
    """The lowest number of an episode that any of these checkpoints needs to resume."""
    held: list[int] = []
    for path in checkpoints:
        with contextlib.suppress(checkpoint.CheckpointError):  # damaged since it was written
            held += checkpoint.load_meta(path)["cursor"]["replay"]
    return min(held, default=0)


def _refuse_lost(run_dir: Path, config: Config, loaded: Loaded | None) -> None:
    """Raise RunError where a run had checkpoints and has none any more.

    A kill before the first one leaves metrics of no more updates than there are between two; those
    come again.
    """
    if loaded is not None:
        return
    updates = [0]
    if (run_dir / METRICS_FILE).exists():
        updates += [line["update"] for line in read_metrics(run_dir)]
    for path in checkpoint.list_snapshots(run_dir / "snapshots").values():
        with contextlib.suppress(checkpoint.CheckpointError):
            updates.append(checkpoint.load_meta(path)["cursor"]["update"])
    if max(updates) > config.train.checkpoint_every:
        raise RunError(
            f"{run_dir} has made {max(updates)} updates, but {run_dir / 'checkpoints'} holds no "
            "checkpoint to go on from: put them back, or start afresh with `fastdreamer train "
            f"{config.env.task}`, which makes a new run and leaves this one as it is"
        )


class StopSignals:
    """Ctrl-C and SIGTERM, noted in ``asked``; see :func:`stop_signals`."""

    def __init__(self) -> None:
        self.asked = False

    def note(self, *_: object) -> None:
        """The signals' handler."""
        if self.asked:
            raise Stopped(saved=False)
        self.asked = True

    def check(self) -> None:
        """Raise Stopped if asked to: where there is nothing to save."""
        if self.asked:
            raise Stopped


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Note the first Ctrl-C or SIGTERM instead of raising in the middle of an update.

    The second one raises Stopped wherever it arrives.
    """
    state = StopSignals()
    old = {s: signal.signal(s, state.note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield state
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

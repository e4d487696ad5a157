"""A run's newest agent acting: what happens, what it sees of that and what it dreams.

As a page on this machine, which follows a run that trains, or as one episode in a file.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from fastdreamer.acting.play import config_env, episode_seed
from fastdreamer.analysis.viz.panels import panels
from fastdreamer.config import Config, ConfigError
from fastdreamer.errors import ArgumentError, FastdreamerError
from fastdreamer.files import file_in_the_way, make_directory, replacing
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.training.pretrained import load, read_agent
from fastdreamer.video import write_video

DREAM = 50
"""Decisions of a dream; then another begins where the agent is."""
_LOOKED = 5.0
"""Seconds behind a request for which somebody is taken to be looking."""
_PATIENCE = 10.0
"""Seconds that a request waits for a new picture."""


class WatchError(FastdreamerError, OSError):
    """The page cannot be served as asked."""


class Frame(NamedTuple):
    """One decision."""

    image: np.ndarray  # uint8 [h, w, 3], all panels
    about: dict[str, Any]  # update, env_frames, episode, decision, return


def episode(agent: Dreamer, env: Any, seed: int) -> Iterator[tuple[np.ndarray, int, float]]:
    """Play one episode without exploration noise; yield a picture, the decision and the return.

    The dream goes on blindly, by the actions that the agent takes, for :data:`DREAM` decisions.
    """
    generator = torch.Generator().manual_seed(seed)
    dreaming = torch.Generator().manual_seed(seed + 1)  # the agent's own draws stay an evaluation's
    obs, state, dream, done = env.reset(seed=seed), None, None, False
    total, decision, asleep = 0.0, 0, 0
    while True:
        action, state = agent.act(obs, state, generator=generator)
        if dream is None or asleep == DREAM:
            dream, asleep = state, 0
        pictures = {
            "real": obs["pixels"],
            "reconstruction": agent.decode(state)["pixels"][0],
            f"dream, blind for {asleep} of {DREAM} decisions": agent.decode(dream)["pixels"][0],
        }
        yield panels(pictures), decision, total
        if done:
            return
        dream, asleep = agent.foresee(dream._replace(action=state.action), dreaming), asleep + 1
        obs, reward, terminated, truncated, _ = env.step(action)
        total, decision, done = total + reward, decision + 1, terminated or truncated


class Show:
    """Episodes of a run's newest agent, one after the other; a newer checkpoint acts in the next.

    Args:
        run: see ``load``. seed: of the episodes.
        allow: called with the agent's settings before its environment is made; raises where it may
            not be.

    Raises:
        CheckpointError: there is none. ConfigError: the agent sees no pixels.
    """

    def __init__(
        self, run: Path, seed: int, *, allow: Callable[[Config], None] = lambda config: None
    ) -> None:
        self._run, self._seed = run, seed
        self._loaded: Path | None = None
        self._refresh()
        allow(self.agent.config)
        if "pixels" not in self.agent.obs_shapes:
            raise ConfigError(f"{run} was trained from state: it imagines no images to watch")
        self.env = config_env(self.agent.config)

    def _refresh(self) -> None:
        """Load the newest checkpoint, where it is another than the one that acts."""
        path, _, meta = read_agent(self._run)
        if path != self._loaded:
            self.agent, self._cursor, self._loaded = load(path), meta["cursor"], path

    def frames(self, episodes: int | None = None) -> Iterator[Frame]:
        """Play so many episodes; None: without end."""
        number = 0
        while episodes is None or number < episodes:
            if number:
                with contextlib.suppress(FastdreamerError):  # pruned or damaged: the old one acts
                    self._refresh()
            about = {name: self._cursor[name] for name in ("update", "env_frames")}
            about["episode"] = number + 1
            seed = episode_seed(self._seed, "evaluate", number)
            for image, decision, total in episode(self.agent, self.env, seed):
                yield Frame(image, {**about, "decision": decision, "return": round(total, 1)})
            number += 1


def write(show: Show, out: Path) -> Path:
    """Write one episode as .gif or .mp4, at the speed of the simulation.

    Raises:
        ArgumentError: another ending, or nowhere to write it.
    """
    if out.suffix not in (".gif", ".mp4"):
        raise ArgumentError(f"--out must end in .gif or .mp4, got {out}")
    if out.is_dir() or file_in_the_way(out.parent):
        raise ArgumentError(f"--out {out}: it is a directory, or a file is where its own should be")
    make_directory(out.parent)  # before an episode that would be played for nothing
    images = (frame.image for frame in show.frames(1))
    if out.suffix == ".mp4":
        return write_video(out, images, fps=1 / show.env.decision_seconds)
    first, *rest = (Image.fromarray(image) for image in images)
    with replacing(out) as temporary:
        first.save(
            temporary, "GIF", save_all=True, append_images=rest, loop=0,
            duration=round(1000 * show.env.decision_seconds),
        )  # fmt: skip
    return out


class _Stage:
    """The newest picture, and who waits for the next."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._number, self._frame = -1, None
        self._asked = -_LOOKED

    def put(self, frame: Frame) -> None:
        with self._changed:
            self._number, self._frame = self._number + 1, frame
            self._changed.notify_all()

    def get(self, after: int) -> tuple[int, Frame] | None:
        """The newest picture behind that number; None where there is none for a while."""
        with self._changed:
            self._asked = time.monotonic()
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._number > after, _PATIENCE):
                return None
            self._asked = time.monotonic()
            return self._number, self._frame

    def wait_for_someone(self) -> None:
        """Return at once while somebody looks; else when somebody does again."""
        with self._changed:
            self._changed.wait_for(lambda: time.monotonic() - self._asked < _LOOKED)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/":
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", _PAGE.encode())
        elif path == "/frame":
            number = query.removeprefix("after=")
            self._frame(int(number) if number.isdecimal() else -1)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there are / and /frame\n")

    def _frame(self, after: int) -> None:
        found = self.server.stage.get(after)
        if found is None:
            self._answer(HTTPStatus.NO_CONTENT, "text/plain", b"")
            return
        number, frame = found
        jpeg = io.BytesIO()
        Image.fromarray(frame.image).save(jpeg, "JPEG", quality=90)
        about = json.dumps({"number": number, **frame.about})
        self._answer(HTTPStatus.OK, "image/jpeg", jpeg.getvalue(), {"X-About": about})

    def _answer(
        self, status: HTTPStatus, kind: str, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        with contextlib.suppress(ConnectionError):  # whoever asked is gone
            self.send_response(status)
            for name, value in {
                "Content-Type": kind,
                "Content-Length": str(len(body)),
                "Cache-Control": "no-store",
                **(headers or {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing of every picture that is asked for."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.stage = _Stage()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser hangs up whenever it likes."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def serve(show: Show, port: int, say: Callable[[str], None]) -> None:
    """Serve the page on this machine alone until interrupted; the agent acts while it is looked at.

    Args:
        port: 0 takes a free one.
        say: receives the address.

    Raises:
        ArgumentError: no port has such a number. WatchError: the port is taken.
    """
    if not 0 <= port <= 65535:
        raise ArgumentError(f"--port must be from 0 to 65535, got {port}")
    try:
        server = _Server(port)
    except OSError as error:
        raise WatchError(f"no page at port {port} ({error}): choose another --port") from error
    stage = server.stage
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        say(f"http://127.0.0.1:{server.server_port} shows {show.env.task}; Ctrl-C ends it")
        due = time.monotonic()
        for frame in show.frames():
            stage.wait_for_someone()
            stage.put(frame)
            # As fast as the simulated world goes, or as the machine can.
            due = max(due + show.env.decision_seconds, time.monotonic() - 0.5)
            time.sleep(max(0.0, due - time.monotonic()))
    finally:
        server.shutdown()
        server.server_close()


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>fastdreamer watch</title>
<style>
  body { margin: 2rem auto; max-width: 50rem; font: 1rem/1.5 system-ui, sans-serif;
         background: #fff; color: #222 }
  img { width: 100%; image-rendering: pixelated; background: #eee; min-height: 8rem }
  @media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } }
</style>
<h1>fastdreamer watch</h1>
<img id="picture" alt="what happens, what the agent sees of it, and what it dreams">
<p id="about" role="status">waiting for the first picture</p>
<p>The dream follows the same actions blindly. The newest checkpoint acts in each new episode.</p>
<script>
  const picture = document.getElementById("picture"), about = document.getElementById("about");
  const words = a => `update ${a.update}, ${a.env_frames} env frames; episode ${a.episode}: ` +
                     `return ${a.return} after ${a.decision} decisions`;
  (async () => {
    for (let after = -1; ;) {
      try {
        const answer = await fetch("/frame?after=" + after);
        if (answer.status != 200) continue;
        const told = JSON.parse(answer.headers.get("X-About"));
        const old = picture.src;
        picture.src = URL.createObjectURL(await answer.blob());
        URL.revokeObjectURL(old);
        about.textContent = words(told);
        after = told.number;
      } catch {
        about.textContent = "fastdreamer watch has ended";
        after = -1;  // another may begin at its first picture
        await new Promise(done => setTimeout(done, 1000));
      }
    }
  })();
</script>
</html>
"""

"""A runner that plays what the spec says, so that tests decide what a job does. All else is the real one.

A script is a list of acts: ``["steps", n, seconds_each]``, ``["publish", kind, name, text]``,
``["metrics", step, {…}]``, ``["fail", code, message]``, ``["raise", text]``, ``["die", signal]``,
``["hang", seconds]`` (deaf to stops), ``["seize", seconds]`` (no other thread runs meanwhile),
``["phase", name]``, ``["fetch", key, sha256, size]``,
``["chatter", seconds]`` (a thread that says something again and again), ``["exit", status]``,
``["fork"]`` (starts a child process; the log says ``pids`` and those of both), and
``["train", steps, seconds_each, checkpoint_every]``: leaves at a boundary, goes on from its last checkpoint, and
publishes as ``weights`` what depends on every step that was done. Generate jobs are played together, a few at once;
``["part"]`` says that what failed was everybody's. ``["spill", bytes]`` leaves a temporary file; the log says its path.
``["store", bytes]`` and ``["obtain", key, sha256, size]`` move large objects.

``SCRIPTED_STORAGE_PATIENCE``: seconds for which it waits for storage instead.
"""

import ctypes
import hashlib
import json
import os
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from shared import errors
from worker import runner
from worker.run import Desk, Parted, Run, Stopped, StoredObject

SEATS = 4
"""Jobs that are played at once, if they share the device."""


def play(run: Run) -> dict[str, Any]:
    result = {"fence": run.assignment.fence, "pid": os.getpid(), "inputs": dict(run.assignment.inputs)}
    for act, *arguments in run.assignment.spec["script"]:
        result |= _ACTS[act](run, *arguments) or {}
    return result


def play_together(desk: Desk) -> None:
    """Each job in a thread, all of them at once."""
    playing: list[Thread] = []
    while True:
        for run in desk.arrivals():
            playing.append(Thread(target=lambda run=run: desk.settle(run, lambda: play(run)), daemon=True))
            playing[-1].start()
        playing = [thread for thread in playing if thread.is_alive()]
        desk.room(SEATS - len(playing))
        if not playing:
            return
        time.sleep(0.01)


def _steps(run: Run, count: int, seconds: float) -> None:
    for step in range(1, count + 1):
        time.sleep(seconds)
        try:
            run.step(step, count, loss=1.0 / step)
        except Stopped as stopped:
            if stopped.reason != "cancel":
                run.publish("checkpoint", f"step-{step}", b"state", media_type="text/plain", metadata={"step": step})
            raise


def _train(run: Run, steps: int, seconds: float, every: int) -> dict[str, Any]:
    begun = run.assignment.inputs.get("resume")
    first, digest = 0, ""
    if begun:
        state = run.fetch(StoredObject(**{name: begun[0][name] for name in ("key", "sha256", "size_bytes")}))
        first, digest = json.loads(state.read_text())
    for step in range(first + 1, steps + 1):
        time.sleep(seconds)
        digest = hashlib.sha256(f"{digest}{step}".encode()).hexdigest()
        checkpoint = partial(_checkpoint, run, step, digest)
        try:
            run.step(step, steps, loss=1.0 / step)
        except Stopped as stopped:
            if stopped.reason != "cancel":
                checkpoint()
            raise
        if step % every == 0:
            checkpoint()
            run.boundary()
    weights = run.publish("weights", "weights", digest.encode(), media_type="text/plain")
    return {"weights": weights.as_json(), "info": {}, "metrics": {}, "first": first}


def _checkpoint(run: Run, step: int, digest: str) -> None:
    body, about = json.dumps([step, digest]).encode(), {"step": step, "keep": 2, "score": None}
    run.publish("checkpoint", f"step-{step}", body, media_type="application/json", metadata=about)


def _fork(run: Run) -> None:
    child = subprocess.Popen(["sleep", "1000"])
    run.log(f"pids {os.getpid()} {child.pid}")


def _spill(run: Run, size_bytes: int) -> None:
    path = Path(tempfile.mkdtemp()) / "spilt"
    path.write_bytes(bytes(size_bytes))
    run.log(str(path))


def _store(run: Run, size_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large"
        path.write_bytes(bytes(size_bytes))
        run.publish("weights", "large", path, media_type="application/octet-stream")


def _obtain(run: Run, key: str, sha256: str, size_bytes: int) -> None:
    run.fetch(StoredObject(key=key, sha256=sha256, size_bytes=size_bytes))


def _chatter(run: Run, seconds: float) -> None:
    def talk() -> None:
        while True:
            run.log("still uploading")
            time.sleep(seconds)

    Thread(target=talk, daemon=True).start()


def _publish(run: Run, kind: str, name: str, text: str) -> None:
    run.publish(kind, name, text.encode(), media_type="text/plain")  # pyright: ignore[reportArgumentType]


def _fail(run: Run, code: str, message: str) -> None:
    kinds = {
        kind.code: kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.JobError)
    }
    raise kinds[code](message)


def _raise(run: Run, text: str) -> None:
    raise RuntimeError(text)


def _fetch(run: Run, key: str, sha256: str, size_bytes: int) -> None:
    run.log(run.fetch(StoredObject(key=key, sha256=sha256, size_bytes=size_bytes)).read_text())


def _throw(error: Exception) -> None:
    raise error


_ACTS: dict[str, Any] = {
    "steps": _steps,
    "publish": _publish,
    "metrics": lambda run, step, values: run.metrics(step, "train", values),
    "phase": lambda run, name: run.phase(name),
    "model": lambda run, was_loaded: run.found_model(was_loaded=was_loaded),
    "fail": _fail,
    "raise": _raise,
    "die": lambda run, signal: os.kill(os.getpid(), signal),
    "hang": lambda run, seconds: time.sleep(seconds),
    "seize": lambda run, seconds: ctypes.PyDLL(None).sleep(seconds) and None,
    "fetch": _fetch,
    "exit": lambda run, status: os._exit(status),
    "chatter": _chatter,
    "fork": _fork,
    "spill": _spill,
    "store": _store,
    "obtain": _obtain,
    "train": _train,
    "oom": lambda run: _throw(MemoryError()),
    "part": lambda run: _throw(Parted()),
}

if __name__ == "__main__":
    runner.executor = lambda job_type: play  # pyright: ignore[reportAttributeAccessIssue]
    runner.server = lambda job_type: play_together if job_type == "generate" else None  # pyright: ignore
    runner.choose_device = lambda settings: "cpu"  # pyright: ignore[reportAttributeAccessIssue]
    patience = os.environ.get("SCRIPTED_STORAGE_PATIENCE", runner.STORAGE_PATIENCE)
    runner.STORAGE_PATIENCE = float(patience)  # pyright: ignore[reportConstantRedefinition, reportAttributeAccessIssue]
    runner.main()

"""What checkpoints cost a training: one network, trained with and without a checkpoint on its way to storage.

Three kinds of blocks of steps take turns: alone; with a checkpoint being written, hashed and uploaded to a real S3
server all the time, by a thread of equal priority; and by a thread of lower priority, as trainings do it. Told are the
steps (wall time, and the training thread's own CPU time, which other processes do not change), the copy out of the
device, and the longest time that a checkpoint kept the training from its next step. Prints JSON.

    python -m bench.checkpoint [--rounds 6] [--hidden-dim 4096]
"""

import argparse
import json
import os
import platform
import secrets
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import SecretStr

from noisemill.local.ports import free_port
from noisemill.local.processes import launch, stop, wait_ready
from noisemill.local.servers import ObjectStore
from shared.settings import S3Settings
from shared.specs import VaeSpec
from shared.storage import Storage
from worker.channel import Message
from worker.engine.numerics import exact
from worker.engine.training import Trainer
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.jobs.background import Background
from worker.jobs.checkpoints import Checkpoints
from worker.run import Assignment
from worker.runner import RunnerRun

BLOCK: Final = 10
"""Steps of one kind in a row."""
KINDS: Final = ("alone", "equal", "lower")


class Reporter:
    """Stands where the runner's process is: storage, and nobody who listens."""

    device = "cpu"

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.channel = self

    def send(self, message: Message) -> None:
        """Say nothing to nobody."""


@contextmanager
def storage() -> Iterator[Storage]:
    """A real S3 server with an empty bucket."""
    with tempfile.TemporaryDirectory(prefix="noisemill-bench-") as folder:
        access, secret = secrets.token_hex(8), secrets.token_hex(16)
        server = ObjectStore(folder=Path(folder) / "s3", port=free_port(), access_key=access, secret_key=secret)
        process = launch(server, logs=Path(folder) / "logs", folder=Path(folder), base_env=os.environ)
        try:
            wait_ready(server, process, logs=Path(folder) / "logs", limit=timedelta(seconds=60))
            reach = {"endpoint": server.endpoint, "access_key": access, "secret_key": SecretStr(secret)}
            settings = S3Settings(bucket="bench", **reach)
            made = Storage(settings)
            made.ensure_bucket()
            yield made
        finally:
            stop(process, first=server.stop_signal, grace=server.grace)


def trainer_of(hidden_dim: int) -> Trainer[Any, Any]:
    spec = VaeSpec(family="vae", dataset="ds_" + "0" * 32, model="m", network="mlp", hidden_dim=hidden_dim)
    return Trainer(FAMILIES["vae"], spec, DataInfo(shape=(1, 28, 28)), torch.device("cpu"))


class Measurement:
    """Seconds by what they were spent on, and by kind of block."""

    def __init__(self, trainer: Trainer[Any, Any], bucket: Storage) -> None:
        self.trainer, self.runner = trainer, Reporter(bucket)
        self.batch = {"image": torch.zeros(128, 1, 28, 28, dtype=torch.uint8)}
        self.steps: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)
        self.copies: list[float] = []
        self.blocked: list[float] = []
        self.stored = 0
        for _ in range(BLOCK):  # the first steps import and allocate
            self.trainer.advance(self.batch)

    def block(self, kind: str) -> None:
        assignment = Assignment(job_id="job_0", fence=self.stored, type="train", spec={}, inputs={"resume": []})
        checkpoints = Checkpoints(RunnerRun(self.runner, assignment), keep=3)  # type: ignore[arg-type]
        if kind == "equal":
            checkpoints._uploads = Background(niceness=0)  # noqa: SLF001 (the comparison)
        for _ in range(BLOCK):
            if kind != "alone" and not checkpoints.is_busy:
                self.store(checkpoints)
            wall, cpu = time.perf_counter(), time.thread_time()
            self.trainer.advance(self.batch)
            self.steps[kind].append(time.perf_counter() - wall)
            self.cpu[kind].append(time.thread_time() - cpu)
        checkpoints.join()
        checkpoints.abandon()

    def store(self, checkpoints: Checkpoints) -> None:
        began = time.perf_counter()
        checkpoint = self.trainer.checkpoint()
        copied = time.perf_counter()
        checkpoints.begin(checkpoint)
        self.blocked.append(time.perf_counter() - began)
        self.copies.append(copied - began)
        self.stored += 1

    def figures(self) -> dict[str, Any]:
        alone = statistics.median(self.cpu["alone"])
        return {
            "checkpoint_bytes": sum(t.numel() * t.element_size() for t in self.trainer.checkpoint().tensors.values()),
            "checkpoints": self.stored,
            "copy_ms": _milliseconds(self.copies),
            "blocked_ms": _milliseconds(self.blocked),
            "blocked_beyond_copy_ms": _milliseconds(
                [blocked - copy for blocked, copy in zip(self.blocked, self.copies, strict=True)]
            ),
            "step_ms": {kind: _milliseconds(self.steps[kind]) for kind in KINDS},
            "step_cpu_ms": {kind: _milliseconds(self.cpu[kind]) for kind in KINDS},
            "cpu_share": {kind: round(statistics.median(self.cpu[kind]) / alone - 1, 4) for kind in KINDS},
        }


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return {"p50": round(1000 * statistics.median(seconds), 2), "max": round(1000 * max(seconds), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--hidden-dim", type=int, default=4096)
    options = parser.parse_args()
    with storage() as bucket, exact(1):
        measurement = Measurement(trainer_of(options.hidden_dim), bucket)
        for turn in range(options.rounds):
            for place in range(len(KINDS)):
                measurement.block(KINDS[(turn + place) % len(KINDS)])
        machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
        json.dump(measurement.figures() | machine | {"torch": torch.__version__}, sys.stdout, indent=2)
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()

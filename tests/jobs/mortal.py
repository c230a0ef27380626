"""A process whose trainings are killed: ``python -m tests.jobs.mortal``.

Each line of its input is one attempt, which gets a process of its own that has computed nothing before. What an
attempt reports goes into a journal, line by line, as the supervisor would commit it.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch._dynamo  # the optimizer imports it in its first step, which takes seconds: once is enough  # noqa: F401

from shared.specs import FAMILIES as SPECS
from tests.engine.toy import TOY, ToySpec
from tests.jobs.folder_run import FolderRun
from worker.families import FAMILIES
from worker.jobs import train as executor
from worker.run import Assignment, StoredObject

_PATIENCE = 20.0
"""Seconds to wait for a checkpoint that is being stored."""


@dataclass
class MortalRun(FolderRun):
    """A run that keeps a journal and dies after a step."""

    journal: TextIO = sys.stdout
    began: int = sys.maxsize
    die_at: int | None = None
    after_checkpoint: bool = False
    """Die once the checkpoint that is due by then is in storage, and not while it is on its way."""

    def note(self, **entry: Any) -> None:
        self.journal.write(json.dumps({"attempt": self.assignment.fence, **entry}) + "\n")
        self.journal.flush()

    def step(self, step: int, steps: int, **values: float) -> None:
        if values:
            self.note(step=step, values=values)
        self.began = min(self.began, step)
        if step == self.die_at:
            if self.after_checkpoint and step >= self.began + self.assignment.spec["checkpoint_every"]:
                self.wait_for_checkpoint()
            os.kill(os.getpid(), signal.SIGKILL)

    def wait_for_checkpoint(self) -> None:
        give_up = time.monotonic() + _PATIENCE
        while not self.artifacts("checkpoint") and time.monotonic() < give_up:
            time.sleep(0.005)

    def metrics(self, step: int, split: str, values: Mapping[str, float]) -> None:
        self.note(measured=step, split=split, values=dict(values))

    def publish(self, kind: str, name: str, body: bytes | Path, **about: Any) -> StoredObject:
        stored = super().publish(kind, name, body, **about)
        if kind == "checkpoint":
            self.note(checkpoint=stored.as_json() | {"step": about["metadata"]["step"]})
        return stored


def attempt(order: Mapping[str, Any]) -> None:
    """Train, and put the result into the journal."""
    executor.FAMILIES, executor.SPECS = {**FAMILIES, "toy": TOY}, {**SPECS, "toy": ToySpec}  # pyright: ignore
    with Path(order["journal"]).open("a") as journal:
        run = MortalRun(
            folder=Path(order["folder"]),
            feature_networks=Path(order["folder"]) / "networks",
            assignment=Assignment(**order["assignment"]),
            journal=journal,
            die_at=order["die_at"],
            after_checkpoint=order["after_checkpoint"],
        )
        result = executor.train(run)
        run.note(result=result)


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            attempt(json.loads(line))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()

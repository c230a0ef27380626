"""The processes that train one network beside this one, each on a device of its own, here or on other hosts. They live
as long as the block.

A process of the crew is told what to do through the team (``worker.engine.team``): to ``join`` the training as it is
now, or to do its next ``step``. It stores and reports nothing, so that it can be killed at any time.
"""

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal

import torch

from shared.errors import NanLoss, OutOfMemory, WorkerLost
from shared.specs import FAMILIES as SPECS
from shared.specs.training import TrainSpec
from worker.data.dataset import open_images
from worker.engine.numerics import exact
from worker.engine.team import ALONE, Team
from worker.engine.training import Trainer
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.gathering import Member
from worker.jobs.batches import Ahead, Batches
from worker.lifeline import ending_with

Order = Literal["join", "step"]

READY: Final = "ready"
"""What a process says when it has imported what it needs: from then on it meets the others at once."""
PARTING: Final = 5.0
"""Seconds in which a process whose connection was closed has ended, if it is dying."""


@contextmanager
def crew(
    devices: Sequence[str],
    spec: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Path]],
    *,
    members: Sequence[Member] = (),
    host: str = "",
) -> Iterator[Team]:
    """The team that trains on ``devices``, of which this process is the first, and on those of ``members``.

    Args:
        devices: one for each process of this host; this one's first.
        spec: of the training, as JSON.
        files: of each dataset, by the name that its samples have in a batch.
        members: other hosts, which have the data.
        host: by which these reach this one.

    Raises:
        WorkerLost: a process of the crew died, or did not come.
    """
    size = len(devices) + sum(member.num_processes for member in members)
    if size == 1:
        yield ALONE
        return
    with tempfile.TemporaryDirectory(prefix="noisemill-") as folder, ExitStack() as stack:
        meeting = f"tcp://{host}:{_free_port(host)}" if members else f"file://{folder}/meeting"
        common = {"meeting": meeting, "size": size, "spec": spec, "num_threads": torch.get_num_threads()}
        others = [
            stack.enter_context(start_process({**common, "files": files, "rank": rank, "device": device}))
            for rank, device in enumerate(devices[1:], 1)
        ]
        rank = len(devices)
        for member in members:
            member.join(**common, ranks=list(range(rank, rank + member.num_processes)))
            rank += member.num_processes
        for process in others:
            _await_ready(process)
        try:
            team = stack.enter_context(Team.joined(torch.device(devices[0]), meeting=meeting, rank=0, size=size))
        except RuntimeError as error:
            raise WorkerLost("not all processes came that were to train together") from error
        try:
            yield team
        except RuntimeError as error:
            if any(member.has_left(PARTING) for member in members) or any(_has_ended(process) for process in others):
                raise WorkerLost("a process that trained beside this one died") from error
            raise


def versions() -> dict[str, str]:
    """What must be the same on all hosts of a training."""
    try:
        ours = version("noisemill")
    except PackageNotFoundError:  # run where it lies
        ours = "unknown"
    return {"noisemill": ours, "torch": torch.__version__}


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        return server.getsockname()[1]


@contextmanager
def start_process(orders: Mapping[str, Any], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process of the crew, until the end of the block; ``options`` are those of ``subprocess.Popen``."""
    command = [sys.executable, "-m", "worker.jobs.crew"]
    # In the process group of this one, whose supervisor ends all of it, unless options say otherwise.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options) as process:
        try:
            with suppress(BrokenPipeError):  # it died: who waits for it will say so
                print(json.dumps(orders, default=str), file=process.stdin, flush=True)
            yield process
        finally:
            process.kill()


def _await_ready(process: subprocess.Popen[str]) -> None:
    if process.stdout is None or process.stdout.readline().strip() != READY:
        raise WorkerLost("a process that was to train beside this one did not start")


def _has_ended(process: subprocess.Popen[str]) -> bool:
    try:
        process.wait(PARTING)
    except subprocess.TimeoutExpired:
        return False
    return True


def order(team: Team, what: Order, **about: Any) -> None:
    """Tell the crew what all of the team do now."""
    team.tell({"do": what, **about})


def follow(team: Team, device: torch.device, spec: TrainSpec, ahead: Ahead) -> None:
    """Do what the first process of the team orders; does not return."""
    family, trainer = FAMILIES[spec.model_dump()["family"]], None
    while True:
        told = team.hear()
        if told["do"] == "join":
            trainer = None  # its memory is needed for the next one
            trainer = Trainer.join(family, spec, DataInfo.from_json(told["data"]), device, team)
            torch.set_num_threads(trainer.numerics.num_threads)
        elif trainer is not None:
            with suppress(NanLoss, OutOfMemory):  # the first process meets it, too, and decides
                trainer.advance(ahead.at(trainer.step))


def main() -> None:
    orders = json.loads(sys.stdin.readline())
    sys.stdout.write(f"{READY}\n")
    sys.stdout.flush()
    device = torch.device(orders["device"])
    where = {name: orders[name] for name in ("meeting", "rank", "size")}
    ends = ending_with(orders["lifeline"]) if "lifeline" in orders else nullcontext()
    with ends, exact(orders["num_threads"]), Team.joined(device, **where) as team:
        spec = SPECS[orders["spec"]["family"]].model_validate(orders["spec"])
        files = {name: {file: Path(path) for file, path in paths.items()} for name, paths in orders["files"].items()}
        batches = Batches({name: open_images(paths) for name, paths in files.items()}, spec)
        follow(team, device, spec, Ahead(batches, team, device))


if __name__ == "__main__":
    main()

"""Compiles blocks of a network in a process beside this one, so that nothing waits for it.

The process leaves its code in the machine's cache (``worker.code_cache``), is killed with all that it started when
nobody wants it any more, and when the process dies that started it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final, Literal

import torch
from torch import nn

from shared.specs import FAMILIES as SPECS
from shared.specs.training import TrainSpec
from worker.code_cache import CodeCache, clear, is_whole, seal
from worker.engine.blocks import HEADERS, Call, CompilationFailed, code_key, compile_blocks, disturb
from worker.engine.numerics import Numerics, exact, for_sampling
from worker.engine.training import build, networks
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.lifeline import ending_with

Use = Literal["training", "sampling"]

COMMAND: Final = (sys.executable, "-m", "worker.jobs.compiler")
"""How a compiling process is started."""
PATIENCE: Final = 480.0
"""Seconds that a compilation may take. Below the time in which a runner that does no step is taken for stuck."""
NUM_PROCESSES: Final = max(1, min(8, (os.cpu_count() or 1) // 2))
"""That compile at one time."""
NICENESS: Final = 10
"""Of the process, so that it takes the cores that steps leave."""


class Compiler:
    """A process that compiles; ``close`` ends it, however far it is."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        """Start it; OSError if that cannot be."""
        self._give_up = time.monotonic() + PATIENCE
        # Files, not pipes: nobody waits until the other one reads.
        self._answer = TemporaryFile("w+")  # noqa: SIM115 - open until ``close``
        theirs, self._lifeline = os.pipe()
        try:
            with TemporaryFile("w+") as told:
                json.dump(order, told)
                told.seek(0)
                # A group of its own, so that compilers which it starts can be ended with it.
                self._process = subprocess.Popen(
                    [*COMMAND, "--lifeline", str(theirs)],
                    pass_fds=[theirs],
                    stdin=told,
                    stdout=self._answer,
                    start_new_session=True,
                )
        except OSError:
            os.close(self._lifeline)
            self._answer.close()
            raise
        finally:
            os.close(theirs)

    @property
    def is_done(self) -> bool:
        """Whether it is known how it ended."""
        return self._process.poll() is not None or time.monotonic() > self._give_up

    def outcome(self) -> None:
        """Raise CompilationFailed unless it is done, and has compiled all."""
        if self._process.poll() is None:
            raise CompilationFailed(f"it took more than {PATIENCE:.0f} seconds")
        self._answer.seek(0)
        said = self._answer.read().strip()
        if self._process.returncode != 0 or said:
            raise CompilationFailed(said or f"the compiling process ended with {self._process.returncode}")

    def close(self) -> None:
        """End it and all that it started."""
        if self._answer.closed:
            return
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        os.close(self._lifeline)
        self._process.wait()
        self._answer.close()


def order_of(
    use: Use, spec: TrainSpec, data: DataInfo, numerics: Numerics, calls: Sequence[Call], cache: CodeCache
) -> dict[str, Any]:
    """What a compiling process has to know."""
    return {
        "use": use,
        "spec": spec.model_dump(mode="json"),
        "data": data.as_json(),
        "numerics": numerics.as_json(),
        "calls": [call.as_json() for call in calls],
        "cache": {"folder": str(cache.folder), "limit_bytes": cache.limit_bytes},
    }


def work_off(order: Mapping[str, Any], device: torch.device) -> None:
    """Compile what ``order_of`` told, unless the cache has it.

    Raises:
        CompilationFailed: it did not work.
    """
    spec = SPECS[order["spec"]["family"]].model_validate(order["spec"])
    numerics = Numerics.from_json(order["numerics"])
    calls = [Call.from_json(call) for call in order["calls"]]
    cache = CodeCache(Path(order["cache"]["folder"]), limit_bytes=order["cache"]["limit_bytes"])
    with exact(numerics.num_threads), numerics.products():
        net = _network(order["use"], spec, DataInfo.from_json(order["data"]), numerics)
        name = code_name(order["use"], net, calls, device)
        for call in calls:
            net.get_submodule(call.block).to(device)
        with cache.opened(name, alone=True) as folder:
            if not is_whole(folder):
                clear(folder)
            elif order["use"] == "training":
                return  # all that it needs was compiled at one time
            compile_blocks(net, calls, device, folder, NUM_PROCESSES)
            shutil.rmtree(folder / HEADERS, ignore_errors=True)
            seal(folder)
    cache.make_room(but=name)


def code_name(use: Use, net: nn.Module, calls: Sequence[Call], device: torch.device) -> str:
    """The folder of a network's compiled code. How a training calls its blocks is known at its first step; while
    samples are drawn it turns out by and by, and is compiled into one folder."""
    return code_key(net, calls if use == "training" else [], device)


def _network(use: Use, spec: TrainSpec, data: DataInfo, numerics: Numerics) -> nn.Module:
    """As the one that is to use the code, but in main memory: only blocks go where a training needs all there is."""
    family = FAMILIES[spec.model_dump()["family"]]
    if use == "sampling":
        net: nn.Module = for_sampling(build(family, spec, data), numerics)
    else:
        _, net = networks(family, spec, data, numerics, torch.device("cpu"))
    disturb(net)
    return net


def main() -> None:
    lifeline, order = int(sys.argv[sys.argv.index("--lifeline") + 1]), json.loads(sys.stdin.readline())
    # What compilers print is no answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.nice(NICENESS)
    with ending_with(lifeline):
        try:
            work_off(order, torch.device(order["device"]))
        except (CompilationFailed, OSError) as error:
            answer.write(str(error))
            answer.flush()


if __name__ == "__main__":
    main()

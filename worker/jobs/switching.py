"""When the steps of a training begin to be computed by compiled code, and what happens where nothing can be compiled.

The training never waits for its first step, and no choice of the moment is forgotten: the step of the switch is a part
of the checkpoints, and an attempt that goes on behind it compiles first. What cannot be compiled costs the job nothing.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import torch

from shared.specs.training import TrainSpec
from worker.code_cache import is_whole
from worker.engine.blocks import Call, CompilationFailed, compile_blocks, plain, recorded
from worker.engine.training import Trainer
from worker.jobs.compiler import Compiler, code_name, order_of
from worker.run import Run

_LOOK_EVERY: Final = 0.1
"""Seconds between two looks at a compilation that is waited for."""


class Switch:
    """The compilation of one training."""

    def __init__(self, run: Run, spec: TrainSpec, num_processes: int) -> None:
        self._run, self._spec = run, spec
        self.calls: list[Call] = []
        """How the blocks are called, once a step was done, in this attempt or an earlier one."""
        self._compiler: Compiler | None = None
        self._is_used = False
        self._is_wanted = spec.compiled_from is not None
        if num_processes > 1:
            self._give_up("it has several devices")

    @contextmanager
    def observed(self, trainer: Trainer[Any, Any]) -> Iterator[None]:
        """The context of a step: the first one tells what is to be compiled, which then begins."""
        is_sized = self._spec.micro_batch != "auto" or trainer.numerics.micro_batch is not None
        if not self._is_wanted or self.calls or not is_sized:
            yield
            return
        with recorded(trainer.computing) as calls:
            yield
        self.calls = calls
        if calls:
            self._begin(trainer)
        else:
            self._give_up("none of its blocks was called")

    def resume(self, trainer: Trainer[Any, Any], calls: Sequence[Mapping[str, Any]]) -> None:
        """Go on where a checkpoint left off, which had noted ``calls``; waits if it was computed by compiled code."""
        with suppress(TypeError, ValueError, KeyError):  # notes of another release: the next step tells anew
            self.calls = [Call.from_json(call) for call in calls]
        if self.calls and self._is_wanted and self._compiler is None:
            self._begin(trainer)
        if trainer.numerics.is_compiled and not self._is_taken(trainer):
            trainer.numerics = trainer.numerics.switched(trainer.step)

    def is_made(self, trainer: Trainer[Any, Any]) -> bool:
        """Make the switch if it is due before the next step; True if it was made."""
        if not self._is_wanted or trainer.numerics.is_compiled or self._compiler is None:
            return False
        due = self._compiler.is_done if self._spec.compiled_from == "auto" else trainer.step == self._spec.compiled_from
        if not due or not self._is_taken(trainer):
            return False
        trainer.numerics = trainer.numerics.switched(trainer.step)
        self._run.log(f"Compiled code computes the network's blocks from step {trainer.step} on.")
        return True

    def close(self) -> None:
        """Compile no more."""
        if self._compiler is not None:
            self._compiler.close()
        if self._is_used:
            torch.compiler.reset()  # what was compiled holds on to the network

    def _begin(self, trainer: Trainer[Any, Any]) -> None:
        about = ("training", self._spec, trainer.data, trainer.numerics, self.calls, self._run.code_cache)
        try:
            self._compiler = Compiler(order_of(*about) | {"device": str(trainer.device)})
        except OSError as error:
            self._give_up(str(error))

    def _is_taken(self, trainer: Trainer[Any, Any]) -> bool:
        """Wait for the compiled code and take it into use; False, once and for all, if that cannot be."""
        try:
            self._take(trainer)
        except (CompilationFailed, OSError) as error:
            self._give_up(str(error))
            plain(trainer.computing)
            return False
        return True

    def _take(self, trainer: Trainer[Any, Any]) -> None:
        if self._compiler is None:
            raise CompilationFailed("nothing is known of how its blocks are called")
        if not self._compiler.is_done:
            self._run.phase("compiling")
            while not self._compiler.is_done:
                self._run.step(trainer.step, self._spec.steps)
                time.sleep(_LOOK_EVERY)
            self._run.phase("training")
        self._compiler.outcome()
        name = code_name("training", trainer.computing, self.calls, trainer.device)
        with self._run.code_cache.opened(name, alone=False) as folder, trainer.numerics.products():
            if not is_whole(folder):
                raise CompilationFailed("the code on disk is not what was compiled")
            self._is_used = True
            compile_blocks(trainer.computing, self.calls, trainer.device, folder)

    def _give_up(self, reason: str) -> None:
        if self._is_wanted:
            self._run.log(f"Nothing is compiled, and plain code computes all: {reason}.")
        self._is_wanted = False
        if self._compiler is not None:
            self._compiler.close()
            self._compiler = None

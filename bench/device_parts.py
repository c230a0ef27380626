"""What the parts of ``bench/device.py`` are put together from: a case's rows, data, a trainer, its limit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from bench.limits import Ceilings, Count, Work, count
from bench.timing import Clock, Step, Timing
from bench.usual import unzeroed
from shared.specs.training import TrainSpec
from worker.engine.numerics import exact
from worker.engine.training import Trainer, build
from worker.families import FAMILIES
from worker.families.family import Batch, DataInfo
from worker.kernels.noise import Domain, Noise

CHECKED_STEPS: Final = 8
"""Of which the first two are plain in any case."""


@dataclass(kw_only=True)
class Bench:
    """One run: the clock, what the device reaches, and what came out."""

    clock: Clock
    ceilings: Ceilings
    is_tiny: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    @property
    def device(self) -> torch.device:
        return self.clock.device

    @property
    def compiles(self) -> bool:
        """Whether ``torch.compile`` takes part: it needs most of a minute for a network."""
        return not self.is_tiny

    def record(self, part: str, case: str, timings: Mapping[str, Timing], work: Mapping[str, Work] | Work) -> None:
        """A row for each contestant; ``work`` is that of each, or of all."""
        for contestant, timing in timings.items():
            row = {"part": part, "case": case, "contestant": contestant} | timing.as_json()
            own = work.get(contestant) if isinstance(work, Mapping) else work
            if timing.seconds and own is not None:
                limit = own.seconds(self.ceilings)
                row |= {"limit": limit, "share_of_limit": limit / timing.median}
                row["share_of_matrix_rate"] = own.flops / timing.median / self.ceilings.flops_per_second
            self.rows.append(row)

    def refuse(self, part: str, case: str, error: str) -> None:
        """A row that says why there is no other."""
        self.rows.append({"part": part, "case": case, "contestant": "all", "error": error})


def images_of(batch: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Random bytes ``(B, *shape)``: uint8."""
    noise = Noise.of_step(Domain.TRAINING, 0, 0, range(batch), device)
    return (noise.uniform(*shape) * 256).to(torch.uint8)


def trainer_of(spec: TrainSpec, data: DataInfo, device: torch.device) -> Trainer[Any, Any]:
    """A training of the engine, its weights as those of a network that has learnt something."""
    trainer: Trainer[Any, Any] = Trainer(FAMILIES[str(getattr(spec, "family", ""))], spec, data, device)
    unzeroed(trainer.net)
    return trainer


def captured_checks(spec: TrainSpec, data: DataInfo, batch: Batch, device: torch.device) -> dict[str, float | bool]:
    """Whether steps that are repeated come to the very bits of plain ones, and whether any were."""
    plain, captured = (trainer_of(spec.model_copy(update={"captured": one}), data, device) for one in (False, True))
    captured.net.load_state_dict(plain.net.state_dict())
    captured.average.load_state_dict(plain.average.state_dict())
    with exact():
        figures = [(plain.advance(batch), captured.advance(batch)) for _ in range(CHECKED_STEPS)]
    tensors, others = plain.checkpoint().tensors, captured.checkpoint().tensors
    is_same = all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    repeats = captured.captured.repeats
    return {"is_captured": repeats.num_recorded > 0, "same_bits": is_same and all(one == two for one, two in figures)}


def stepping(spec: TrainSpec, data: DataInfo, batch: Batch, device: torch.device) -> Step:
    """A training step of the engine, as jobs do it."""
    trainer = trainer_of(spec, data, device)

    def step() -> None:
        with exact():
            trainer.advance(batch)

    return step


def counted(spec: TrainSpec, data: DataInfo, device: torch.device, rows: int = 2) -> Count:
    """What one evaluation of a diffusion model's network needs."""
    net = build(FAMILIES[str(getattr(spec, "family", ""))], spec, data).to(device)
    x = images_of(rows, data.shape, device).float()
    t, label = (torch.zeros(rows, dtype=dtype, device=device) for dtype in (torch.float32, torch.int64))
    return count(net.network, lambda: net.network(x, t, label), rows)

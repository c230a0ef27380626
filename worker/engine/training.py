"""Training as a function of the step. Knows no family, no dataset and no job.

State is weights, their average, optimizer moments, loss scales and the number of steps done;
everything else (batch, noise, learning rate) derives from the spec and that number.
"""

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from math import isfinite
from typing import Any, Generic

import torch
from torch import Tensor

from shared.errors import ModelLoadFailed, NanLoss
from worker.engine.checkpoint import Checkpoint, detached_copy, fill
from worker.engine.numerics import Numerics
from worker.engine.part import Part
from worker.engine.schedule import ema_decay, learning_rate, warmup_steps
from worker.families.family import Batch, DataInfo, Family, NetT, SpecT
from worker.kernels.noise import Domain, Noise


def build(family: Family[SpecT, NetT], spec: SpecT, data: DataInfo) -> NetT:
    """The network with its initial weights. The one place that seeds torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return family.build(spec, data)


class Trainer(Generic[SpecT, NetT]):
    """A network being trained, advanced one step at a time."""

    def __init__(
        self,
        family: Family[SpecT, NetT],
        spec: SpecT,
        data: DataInfo,
        device: torch.device,
        numerics: Numerics | None = None,
    ) -> None:
        self.family, self.spec, self.data, self.device = family, spec, data, device
        self.numerics = numerics or Numerics.choose(spec, device)
        self.step = 0
        """Steps done, which is also the number of the step that comes next."""
        self.net: NetT = self.numerics.place_network(build(family, spec, data), device)
        self.average: NetT = deepcopy(self.net).requires_grad_(requires_grad=False).eval()
        """Exponential moving average of the weights: what is evaluated, sampled and published."""
        self.parts = {name: self._part(name) for name in family.losses}

    def _part(self, name: str) -> Part:
        module = self.net if len(self.family.losses) == 1 else self.net.get_submodule(name)
        return Part(dict(module.named_parameters()), self.spec, scale_loss=self.numerics.precision == "fp16")

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.net.parameters())

    def advance(self, batch: Batch) -> dict[str, float]:
        """Do one step on ``batch`` and return its loss, its family's figures and the gradient norm.

        Raises:
            NanLoss: a loss or, without loss scaling, a gradient is not a finite number.
        """
        batch = self.place(batch)
        noise = Noise.of_step(Domain.TRAINING, self.spec.seed, self.step, range(num_rows(batch)), self.device)
        self.net.train()
        values: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            values |= self._update(name, part, batch, noise)
        self._average_weights()
        self.step += 1
        return self._checked(values)

    def place(self, batch: Batch) -> Batch:
        """Move a batch to the device, images in the training's layout."""
        return {name: self.numerics.place(tensor, self.device) for name, tensor in batch.items()}

    def _update(self, name: str, part: Part, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        with self.numerics.autocast(self.device):
            measured = self.family.losses[name](self.spec, self.net, batch, noise)
        grad_norm = part.descend(measured.loss, self.learning_rate)
        prefix = "" if len(self.parts) == 1 else f"{name}_"
        return {f"{prefix}loss": measured.loss, f"{prefix}grad_norm": grad_norm, **measured.values}

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return learning_rate(
            self.step,
            peak=self.spec.learning_rate,
            steps=self.spec.steps,
            warmup_steps=warmup_steps(self.spec.warmup_steps, self.spec.steps),
            schedule=self.spec.schedule,
        )

    @torch.no_grad()
    def _average_weights(self) -> None:
        weight = 1 - ema_decay(self.step, longest=self.spec.ema_decay)
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            list(self.average.parameters()), list(self.net.parameters()), weight
        )
        for averaged, buffer in zip(self.average.buffers(), self.net.buffers(), strict=True):
            averaged.copy_(buffer)

    def _checked(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        # One transfer, so that a GPU is waited for once.
        numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()
        checked = dict(zip(values, numbers, strict=True))
        for name, number in checked.items():
            # A scaled gradient may overflow: the scaler has left that step out.
            may_overflow = self.numerics.precision == "fp16" and name.endswith("grad_norm")
            if not isfinite(number) and not may_overflow:
                raise NanLoss(f"{name} is {number} at step {self.step}")
        return {name: number for name, number in checked.items() if isfinite(number)}

    def checkpoint(self) -> Checkpoint:
        """A copy of the state, so that training may go on while it is written."""
        return Checkpoint(
            step=self.step,
            spec=self.spec.model_dump(mode="json"),
            data=self.data.as_json(),
            numerics=self.numerics.as_json(),
            tensors={name: detached_copy(tensor) for name, tensor in self._tensors()},
        )

    @classmethod
    def resume(
        cls, family: Family[SpecT, NetT], spec: SpecT, data: DataInfo, device: torch.device, checkpoint: Checkpoint
    ) -> "Trainer[SpecT, NetT]":
        """The training that ``checkpoint`` was taken of; on the same hardware it goes on bit for bit.

        Raises:
            ModelLoadFailed: the checkpoint belongs to another spec or other data, or lacks something.
        """
        try:
            numerics = Numerics(**checkpoint.numerics)
            # Validated, so that fields which the spec has gained since then have their defaults.
            same = family.spec.model_validate(checkpoint.spec) == spec and DataInfo.from_json(checkpoint.data) == data
        except (TypeError, KeyError, ValueError) as error:
            raise ModelLoadFailed(f"the checkpoint's header is damaged: {error}") from error
        if not same:
            raise ModelLoadFailed("the checkpoint was taken of another spec or of other data")
        trainer = cls(family, spec, data, device, numerics)
        trainer._load(checkpoint)
        return trainer

    def _load(self, checkpoint: Checkpoint) -> None:
        fill(self.net, _under("net", checkpoint.tensors), "the checkpoint")
        fill(self.average, _under("average", checkpoint.tensors), "the checkpoint")
        for name, part in self.parts.items():
            try:
                part.load(_under(f"part.{name}", checkpoint.tensors))
            except (KeyError, RuntimeError) as error:
                raise ModelLoadFailed(f"the checkpoint does not fit part {name}: {error}") from error
        self.step = checkpoint.step

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, net in (("net", self.net), ("average", self.average)):
            yield from ((f"{prefix}.{name}", tensor) for name, tensor in net.state_dict().items())
        for name, part in self.parts.items():
            yield from ((f"part.{name}.{key}", tensor) for key, tensor in part.tensors())


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def num_rows(batch: Batch) -> int:
    """Samples in a batch."""
    return len(next(iter(batch.values())))


@torch.no_grad()
def evaluate(trainer: Trainer[Any, Any], batches: Iterable[Batch]) -> dict[str, float]:
    """Means of the losses' figures over ``batches``, for the averaged weights.

    The noise depends on a sample's position alone, so figures of different steps are comparable.
    """
    totals: dict[str, float] = {}
    done = 0
    for batch in map(trainer.place, batches):
        rows = range(done, done + num_rows(batch))
        noise = Noise.of_step(Domain.EVALUATION, trainer.spec.seed, 0, rows, trainer.device)
        for measure in trainer.family.losses.values():
            with trainer.numerics.autocast(trainer.device):
                values = measure(trainer.spec, trainer.average, batch, noise).values
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + value.item() * len(rows)
        done = rows.stop
    return {name: total / done for name, total in totals.items()}

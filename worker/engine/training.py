"""Training as a function of the step. Knows no family, no dataset and no job.

State is weights, their averages and copies of these, optimizer moments, loss scales and the number of steps done;
everything else (batch, noise, learning rate) derives from the spec and that number.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor, nn

from shared.errors import ModelLoadFailed, NanLoss, OutOfMemory, TrainingIndivisible
from shared.specs.training import TrainSpec
from worker.engine.augmentation import augmented
from worker.engine.averages import LENGTHS, PowerAverages, power_decay
from worker.engine.blocks import settled
from worker.engine.captured_steps import Kind, captured_steps
from worker.engine.checkpoint import Checkpoint, detached_copy, fill, load_weights, tensors_of
from worker.engine.fitting import largest
from worker.engine.memory import is_out_of_memory, recompute, release
from worker.engine.numerics import Numerics
from worker.engine.part import Part
from worker.engine.rounding import rounded
from worker.engine.schedule import ema_decay, learning_rate, warmup_steps
from worker.engine.share import Share, num_rows
from worker.engine.team import ALONE, Team
from worker.families.family import Batch, DataInfo, Family, NetT, SpecT
from worker.kernels.noise import Domain, Noise


def build(family: Family[SpecT, NetT], spec: SpecT, data: DataInfo) -> NetT:
    """The network with its initial weights. The one place that seeds torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        net = family.build(spec, data)
    for part in _frozen(net, spec, data):
        part.requires_grad_(requires_grad=False)
    return net


def networks(
    family: Family[SpecT, NetT], spec: SpecT, data: DataInfo, numerics: Numerics, device: torch.device
) -> tuple[NetT, NetT]:
    """The network that is learned, with its initial weights, and the one that steps compute with: the same, or one
    whose weights are rounded and which shares all else with it."""
    net = numerics.place_network(build(family, spec, data), device)
    if spec.recompute:
        recompute(net)
    return net, rounded(net) if numerics.precision == "pure_bf16" else net


def _frozen(net: nn.Module, spec: TrainSpec, data: DataInfo) -> list[nn.Module]:
    return [net.get_submodule(field) for field in spec.built_on if field in data.models]


class Trainer(Generic[SpecT, NetT]):
    """A network being trained, advanced one step at a time."""

    def __init__(
        self,
        family: Family[SpecT, NetT],
        spec: SpecT,
        data: DataInfo,
        device: torch.device,
        numerics: Numerics | None = None,
        team: Team = ALONE,
    ) -> None:
        """Begin a training.

        Raises:
            TrainingIndivisible: ``team`` is several processes, which cannot share the batches of this spec.
        """
        if not team.is_alone and spec.most_processes < team.size:
            raise TrainingIndivisible(f"this training can be shared by at most {spec.most_processes} processes")
        self.family, self.spec, self.data, self.device, self.team = family, spec, data, device, team
        self.numerics = numerics or Numerics.choose(spec, device, team.size)
        self.step = 0
        """Steps done, which is also the number of the step that comes next."""
        self.net, self.computing = networks(family, spec, data, self.numerics, device)
        """What is learned, and what steps compute with (``networks``)."""
        self.average: NetT = deepcopy(self.net).requires_grad_(requires_grad=False).eval()
        """Moving average of the weights: what is evaluated, sampled and published."""
        self.averages = self._averages()
        """What lets the length of the average be chosen afterwards, where the spec asks for that."""
        self.parts = {name: self._part(name) for name in family.losses}
        self.captured = captured_steps(spec, self.numerics, device, team)
        """What of its steps a GPU is told once, and then repeats."""

    def _part(self, name: str) -> Part:
        learned, computing = (self._trained(net, name) for net in (self.net, self.computing))
        return Part(learned, self.spec, scale_loss=self.numerics.precision == "fp16", computing=computing)

    def _trained(self, net: NetT, name: str) -> dict[str, nn.Parameter]:
        module = net if len(self.family.losses) == 1 else net.get_submodule(name)
        return {key: tensor for key, tensor in module.named_parameters() if tensor.requires_grad}

    def _averages(self) -> PowerAverages | None:
        if self.spec.ema != "power":
            return None
        return PowerAverages(self.net, self.average, steps=self.spec.steps, num_snapshots=self.spec.ema_snapshots)

    def begin_with(self, field: str, weights: Path) -> None:
        """Take over a trained model: all of the network for ``init_from``, else the part that ``field`` names.

        Raises:
            ModelLoadFailed: the weights do not fit.
        """
        for net in (self.net, self.average):
            load_weights(weights, net if field == "init_from" else net.get_submodule(field))
        for part in self.parts.values():
            part.round()

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.net.parameters())

    def advance(self, batch: Batch) -> dict[str, float]:
        """Do one step on ``batch`` and return its loss, its family's figures and the gradient norm.

        Of a team, each process is given the ``rows`` of the step's batch that are its own, and all are returned the
        same: figures of the whole batch. What does not fit into memory at once is cut in halves, and again, whose
        gradients add up to its own. Noise is keyed by a sample's place in the step's batch, so that each sample keeps
        its own.

        Raises:
            NanLoss: a loss or, without loss scaling, a gradient is not a finite number.
            OutOfMemory: not even one sample fits.
        """
        batch_size = num_rows(batch) if self.team.is_alone else self.spec.batch_size
        for net in (self.net, self.computing):
            net.train()
            for part in _frozen(net, self.spec, self.data):
                part.eval()
        # As bytes, before anything is done to them, so that the device does it.
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        for part in self.parts.values():
            part.learning_rate.fill_(self.learning_rate)
        values = self.captured.advance(self._kind(), batch, self.step, partial(self._update_all, batch_size))
        self._average_weights()
        self.step += 1
        return self._checked(values)

    def _kind(self) -> Kind:
        trained = tuple(name for name in self.parts if self.spec.trains(name, self.step))
        return Kind(trained, self.spec.betas_at(self.step), self.spec.decided_by(self.step), self.numerics)

    def _update_all(self, batch_size: int, batch: Batch) -> dict[str, Tensor]:
        alter = self._augmented if self.spec.augmentation.alters else None
        share = Share(batch, self.team.rows(batch_size), batch_size, alter)
        if self.spec.micro_batch == "auto" and self.numerics.micro_batch is None:
            self._fit(share)
        values: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            if self.spec.trains(name, self.step):
                values |= self._update(name, part, share)
        return values

    @torch.no_grad()
    def _fit(self, share: Share) -> None:
        """Find out how many samples fit at once, and leave no trace of it."""
        before = [buffer.clone() for buffer in self.net.buffers()]
        found = largest(lambda size: self._fits(share.first(size)), self.team.most_rows(share.batch_size))
        for buffer, kept in zip(self.net.buffers(), before, strict=True):
            buffer.copy_(kept)
        self.numerics = replace(self.numerics, micro_batch=found)

    @torch.enable_grad()
    def _fits(self, share: Share) -> bool:
        is_enough = True
        try:
            for name, part in self.parts.items():
                self._accumulate(name, part, share)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            is_enough = False
        for part in self.parts.values():
            part.forget()
        release(self.device)
        return not self.team.anybody(not is_enough)

    def _augmented(self, rows: range, batch: Batch) -> Batch:
        """These rows of the step's batch, as bytes on the device, their images altered."""
        return augmented(batch, self.spec.augmentation, self._noise(Domain.AUGMENTATION, rows))

    def _noise(self, domain: Domain, rows: range, first_row: int = 0) -> Noise:
        return self.captured.keyed(Noise.of_step(domain, self.spec.seed, self.step, rows, self.device, first_row))

    def place(self, batch: Batch) -> Batch:
        """Move a batch to the device, images in the training's layout."""
        return {name: self.numerics.place(tensor, self.device) for name, tensor in batch.items()}

    def _update(self, name: str, part: Part, share: Share) -> dict[str, Tensor]:
        values = None
        while values is None:
            part.forget()
            try:
                with self.numerics.products(), settled(is_compiled=self.numerics.is_compiled):
                    values = self._accumulate(name, part, share)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.captured.repeats.is_recording:
                    raise
            # Not in the handler: there the error still holds its frames, and they the graph.
            if self.team.anybody(values is None):
                values = None
                self._halve(part, self.team.most_rows(share.batch_size))
        self.team.add_up([*part.gradients, *values.values()])
        betas, is_recorded = self.spec.betas_at(self.step), self.captured.repeats.is_recording
        return values | {f"{self._prefix(name)}grad_norm": part.descend(betas, is_recorded=is_recorded)}

    def _accumulate(self, name: str, part: Part, share: Share) -> dict[str, Tensor]:
        """Add up what the rows that are here have of the gradient of the batch's mean loss; returns what they have of
        the means of its figures."""
        totals: dict[str, Tensor] = {}
        for rows, piece in share.pieces(self.micro_batch):
            noise = self._noise(Domain.TRAINING, rows, share.rows.start)
            measured = self._measured(name, self.computing, self.place(piece), noise)
            weight = len(rows) / share.batch_size
            part.accumulate(measured[f"{self._prefix(name)}loss"] * weight)
            for figure, value in measured.items():
                totals[figure] = totals.get(figure, 0) + value.detach() * weight
        return totals

    def _halve(self, part: Part, num_rows: int) -> None:
        part.forget()
        is_roomier = self.captured.repeats.make_room()
        release(self.device)
        if is_roomier:
            return
        if min(self.micro_batch, num_rows) == 1:
            raise OutOfMemory("not even one sample fits into memory beside the network and its optimizer")
        self.numerics = self.numerics.halved(num_rows, self.step)
        # What a network notes at the beginning of a step, not all of them may have come to.
        self.team.follow_first(list(self.net.buffers()))

    def measure(self, batch: Batch, positions: range) -> dict[str, float]:
        """Sums over the batch of the losses and their figures, for the averaged weights."""
        placed = self.place(batch)
        noise = Noise.of_step(Domain.EVALUATION, self.spec.seed, 0, positions, self.device)
        figures: dict[str, Tensor] = {}
        for name in self.family.losses:
            figures |= self._measured(name, self.average, placed, noise)
        return {name: value.item() * len(positions) for name, value in figures.items()}

    def _measured(self, name: str, net: NetT, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        is_rounded = net is not self.net and net is self.computing
        with nullcontext() if is_rounded else self.numerics.autocast(self.device):
            measured = self.family.losses[name](self.spec, net, batch, noise)
        return {f"{self._prefix(name)}loss": measured.loss, **measured.values}

    def _prefix(self, name: str) -> str:
        return "" if len(self.family.losses) == 1 else f"{name}_"

    @property
    def micro_batch(self) -> int:
        """Most samples that go through the network at once."""
        return self.numerics.micro_batch or self.spec.batch_size

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
        is_power = self.averages is not None
        decay = power_decay(self.step, LENGTHS[0]) if is_power else ema_decay(self.step, longest=self.spec.ema_decay)
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            list(self.average.parameters()), list(self.net.parameters()), 1 - decay
        )
        for averaged, buffer in zip(self.average.buffers(), self.net.buffers(), strict=True):
            averaged.copy_(buffer)
        if self.averages is not None:
            self.averages.follow(self.step)

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

    def checkpoint(self, notes: Mapping[str, Any] | None = None) -> Checkpoint:
        """A copy of the state, so that training may go on while it is written; ``notes`` are the caller's."""
        return Checkpoint(
            step=self.step,
            spec=self.spec.model_dump(mode="json"),
            data=self.data.as_json(),
            numerics=self.numerics.as_json(),
            tensors=self._state(),
            notes=notes or {},
        )

    @classmethod
    def resume(
        cls,
        family: Family[SpecT, NetT],
        spec: SpecT,
        data: DataInfo,
        device: torch.device,
        checkpoint: Checkpoint,
        team: Team = ALONE,
    ) -> "Trainer[SpecT, NetT]":
        """The training that ``checkpoint`` was taken of; on the same hardware, and with as many processes, it goes on
        bit for bit.

        Raises:
            ModelLoadFailed: the checkpoint belongs to another spec or other data, or lacks something.
            TrainingIndivisible: as for the class.
        """
        try:
            numerics = Numerics.from_json(checkpoint.numerics).among(team.size, checkpoint.step)
            # Validated, so that fields which the spec has gained since then have their defaults.
            same = family.spec.model_validate(checkpoint.spec) == spec and DataInfo.from_json(checkpoint.data) == data
        except (TypeError, KeyError, ValueError) as error:
            raise ModelLoadFailed(f"the checkpoint's header is damaged: {error}") from error
        if not same:
            raise ModelLoadFailed("the checkpoint was taken of another spec or of other data")
        trainer = cls(family, spec, data, device, numerics, team)
        trainer._load(checkpoint)
        return trainer

    def share(self) -> None:
        """Give the training, as it is, to all others of the team, who ``join`` it."""
        if self.team.is_alone:
            return
        self.team.give(self._state(), {"step": self.step, "numerics": self.numerics.as_json()})

    @classmethod
    def join(
        cls, family: Family[SpecT, NetT], spec: SpecT, data: DataInfo, device: torch.device, team: Team
    ) -> "Trainer[SpecT, NetT]":
        """The training that the first process of ``team`` shares. It needs neither a checkpoint nor weights.

        Raises:
            TrainingIndivisible: as for the class.
        """
        tensors, notes = team.take()
        trainer = cls(family, spec, data, device, Numerics.from_json(notes["numerics"]), team)
        trainer._load(Checkpoint(step=notes["step"], spec={}, data={}, numerics={}, tensors=tensors))
        return trainer

    def _load(self, checkpoint: Checkpoint) -> None:
        for prefix, net in (("net", self.net), ("average", self.average)):
            fill(tensors_of(net), _under(prefix, checkpoint.tensors), "the checkpoint")
        for name, part in self.parts.items():
            try:
                part.load(_under(f"part.{name}", checkpoint.tensors))
                part.round()
            except (KeyError, RuntimeError) as error:
                raise ModelLoadFailed(f"the checkpoint does not fit part {name}: {error}") from error
        if self.averages is not None:
            try:
                self.averages.load(_under("averages", checkpoint.tensors), checkpoint.step)
            except (KeyError, RuntimeError) as error:
                raise ModelLoadFailed(f"the checkpoint's averages do not fit: {error}") from error
        self.step = checkpoint.step

    def _state(self) -> dict[str, Tensor]:
        """A copy of all that the next step depends on."""
        copies = {} if self.averages is None else self.averages.tensors()
        own = {name: detached_copy(tensor) for name, tensor in self._tensors()}
        return own | {f"averages.{name}": tensor for name, tensor in copies.items()}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, net in (("net", self.net), ("average", self.average)):
            yield from ((f"{prefix}.{name}", tensor) for name, tensor in tensors_of(net).items())
        for name, part in self.parts.items():
            yield from ((f"part.{name}.{key}", tensor) for key, tensor in part.tensors())


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}

"""What two processes do together: ``python -m tests.engine.teamwork FOLDER [CASE ...]``.

As ``torchrun`` starts processes, with the rank in the environment. Each case is a function of the team that returns a
training; its state, its gradients and its figures are written to ``FOLDER/<case>.<rank>``. A team of one does the same
alone.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from shared.specs.training import TrainSpec
from tests.engine.conftest import CPU, DATA, bars, small_spec
from tests.jobs.variants import SPECS, small
from worker.engine.checkpoint import Checkpoint, write_tensors
from worker.engine.numerics import exact
from worker.engine.team import Team
from worker.engine.training import Trainer
from worker.families import FAMILIES
from worker.families.family import Batch, DataInfo, Measured, Origin

Case = Callable[[Team, Path], tuple[Trainer[Any, Any], dict[str, float]]]

CHOICES: Final[Mapping[str, tuple[dict[str, Any], ...]]] = {
    "vae": ({"network": "mlp"}, {"network": "ladder"}),
    "vq": ({},),
    "gan": ({}, {"network": "mlp", "objective": "hinge"}),
    "diffusion": ({"network": "dit", "dropout": 0.2},),
    "consistency": ({},),
    "translation": ({"objective": "contrastive"},),
    "style": ({},),
}
"""Trainings of each family whose batches can be shared."""


def specs() -> Iterator[tuple[str, TrainSpec]]:
    """A name and a spec of each; every batch has an odd number of samples."""
    for family, kinds in CHOICES.items():
        for kind in kinds:
            name = "-".join([family, *(str(value) for value in kind.values())])
            fields = small(family, SPECS[family], {"precision": "fp32", "batch_size": 5, **kind})
            yield name, SPECS[family].model_validate(fields)


def data_of(spec: TrainSpec) -> DataInfo:
    """Labelled images, and a model of the first family that will do where one is needed."""
    models = {}
    for field, (_, families) in spec.references().items():
        family = min(families)
        origin = SPECS[family].model_validate({"family": family, "dataset": "ds_" + "0" * 32, "model": field})
        models[field] = Origin(family=family, spec=origin.model_dump(mode="json"), data=labelled())
    return replace(labelled(), models=models)


def labelled() -> DataInfo:
    return replace(DATA, num_classes=4)


def batch_of(spec: TrainSpec, step: int, rows: range) -> Batch:
    """These rows of a step's batch."""
    places = torch.tensor([(7 * (step * spec.batch_size + row)) % 64 for row in rows])
    batch = {"image": bars()[places], "label": places % 4}
    return batch | {name: 255 - bars()[places] for name in spec.further_datasets}


def advanced(trainer: Trainer[Any, Any], steps: int) -> dict[str, float]:
    """The figures of the last of so many steps."""
    figures: dict[str, float] = {}
    for _ in range(steps):
        rows = trainer.team.rows(trainer.spec.batch_size)
        figures = trainer.advance(batch_of(trainer.spec, trainer.step, rows))
    return figures


def one_step(spec: TrainSpec) -> Case:
    """A first step that is not clipped."""

    def case(team: Team, _folder: Path) -> tuple[Trainer[Any, Any], dict[str, float]]:
        family = FAMILIES[spec.model_dump()["family"]]
        unclipped = spec.model_copy(update={"grad_clip": 1e6})
        trainer = Trainer(family, unclipped, data_of(spec), CPU, team=team)
        return trainer, advanced(trainer, 1)

    return case


def several_steps(**fields: Any) -> Case:
    def case(team: Team, _folder: Path) -> tuple[Trainer[Any, Any], dict[str, float]]:
        trainer = Trainer(FAMILIES["vae"], small_spec(batch_size=15, **fields), DATA, CPU, team=team)
        return trainer, advanced(trainer, 6)

    return case


def resumed(**fields: Any) -> Case:
    """As ``several_steps``, but all processes end after two, and others go on from what the first stored."""

    def case(team: Team, folder: Path) -> tuple[Trainer[Any, Any], dict[str, float]]:
        spec, family = small_spec(batch_size=15, **fields), FAMILIES["vae"]
        trainer = Trainer(family, spec, DATA, CPU, team=team)
        advanced(trainer, 2)
        if team.is_first:
            trainer.checkpoint().write(folder / f"half-{team.size}")
            trainer = Trainer.resume(family, spec, DATA, CPU, Checkpoint.read(folder / f"half-{team.size}"), team)
            trainer.share()
        else:
            trainer = Trainer.join(family, spec, DATA, CPU, team)
        return trainer, advanced(trainer, 4)

    return case


def cramped(team: Team, _folder: Path) -> tuple[Trainer[Any, Any], dict[str, float]]:
    """The second process has room for two samples only; the discriminator keeps a vector of its own."""
    gan = FAMILIES["gan"]
    tight = replace(gan, losses={name: confined(loss, team) for name, loss in gan.losses.items()})
    spec = dict(specs())["gan-mlp-hinge"]
    trainer = Trainer(tight, spec.model_copy(update={"critic_steps": 1}), labelled(), CPU, team=team)
    return trainer, advanced(trainer, 2)


def confined(loss: Any, team: Team) -> Any:
    def measure(spec: Any, net: Any, batch: Any, noise: Any) -> Measured:
        if team.rank == 1 and len(noise.index_B) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss(spec, net, batch, noise)

    return measure


CASES: Final[Mapping[str, Case]] = {
    **{f"one-{name}": one_step(spec) for name, spec in specs()},
    "fp32": several_steps(precision="fp32", ema="power", ema_snapshots=3),
    "bf16": several_steps(precision="bf16", network="mlp"),
    "fp16": several_steps(precision="fp16", network="mlp"),
    "augmented": several_steps(precision="fp32", network="mlp", augmentation={"flip": 0.5, "shift": 2}),
    "resumed": resumed(precision="fp32", ema="power", ema_snapshots=3),
    "cramped": cramped,
}


def write(trainer: Trainer[Any, Any], figures: Mapping[str, float], path: Path) -> None:
    """What the training came to."""
    tensors: dict[str, Tensor] = dict(trainer.checkpoint().tensors)
    for name, weight in trainer.net.named_parameters():
        if weight.grad is not None:
            tensors[f"gradient.{name}"] = weight.grad.clone()
    write_tensors(path, tensors, {"figures": figures, "numerics": trainer.numerics.as_json()})


def main() -> None:
    folder, *names = sys.argv[1:]
    with exact(1), Team.joined(CPU) as team:
        for name in names or CASES:
            write(*CASES[name](team, Path(folder)), Path(folder) / f"{name}.{team.rank}")


if __name__ == "__main__":
    main()

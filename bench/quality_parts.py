"""What quality cases are put together from: a trained model, its samples, the judge between two calibrations."""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from bench.digits import Digits, Split
from shared.specs.tasks import Generate, GenerateSpec
from shared.specs.training import TrainSpec
from worker.engine.evaluation import evaluate
from worker.engine.order import BatchOrder
from worker.engine.sampling import Tile, sample
from worker.engine.training import Trainer
from worker.families import FAMILIES
from worker.families.family import Batch, DataInfo, Draw, Origin
from worker.metrics import features
from worker.metrics.distances import frechet_distance
from worker.metrics.sets import pixel_noise

NUM_CLASSES: Final = 10
NUM_SAMPLES: Final = 2000
"""Drawn where a case does not say otherwise: as many as are held out, since the distance depends on the number."""

NUM_PARTS: Final = 20
"""Of a training, all with the same number of steps, whose times are compared."""

REQUEST: Final = TypeAdapter[Any](GenerateSpec)
Measures = dict[str, Any]
"""Figures by name: numbers, or lists of them."""


@dataclass(kw_only=True)
class Trained:
    """A model after its training."""

    trainer: Trainer[Any, Any]
    digits: Digits
    seconds: float
    """Of training alone."""
    cpu_seconds: float
    """Of all threads meanwhile."""
    quiet_cpu_seconds: float
    """The same, had nothing disturbed it: the lower quartile of its parts, as often as there are parts."""
    samples: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Images that were drawn, uint8 ``(N, 1, 28, 28)``, by what they are; the first 64 of each make a sheet."""


def train(
    spec: TrainSpec,
    digits: Digits,
    device: torch.device,
    *,
    models: Mapping[str, Origin] = {},
    further: Mapping[str, Tensor] = {},
    begin: Callable[[Trainer[Any, Any]], None] = lambda trainer: None,
) -> Trained:
    """Train as a job does, with the engine's trainer and order of batches.

    ``models`` are those that the spec's fields name (``DataInfo.models``); ``begin`` fills in their weights. The images
    of ``further`` datasets, by the field that names them, are read in an order of their own.
    """
    family = FAMILIES[str(getattr(spec, "family", ""))]
    data = DataInfo(shape=tuple(digits.train.images.shape[1:]), num_classes=NUM_CLASSES, models=models)
    trainer: Trainer[Any, Any] = Trainer(family, spec, data, device)
    begin(trainer)
    sets = {"image": digits.train.images, **further}
    orders = [
        BatchOrder(len(one), spec.batch_size, spec.seed, series=series) for series, one in enumerate(sets.values())
    ]

    def batch_at(step: int) -> Batch:
        rows = [torch.from_numpy(order.at(step)) for order in orders]
        batch = {name: images[chosen] for (name, images), chosen in zip(sets.items(), rows, strict=True)}
        return batch | {"label": digits.train.labels[rows[0]]}

    return advanced(trainer, digits, batch_at)


def advanced(trainer: Trainer[Any, Any], digits: Digits, batch_at: Callable[[int], Batch]) -> Trained:
    """Take all steps of the spec, with the batch of each, and see what they cost."""
    spec = trainer.spec
    began, marks = time.perf_counter(), [time.process_time()]
    for part in range(NUM_PARTS):
        while trainer.step < spec.steps * (part + 1) // NUM_PARTS:
            trainer.advance(batch_at(trainer.step))
        marks.append(time.process_time())
        sys.stderr.write(f"{spec.model}: {trainer.step} of {spec.steps} steps, {marks[-1] - marks[0]:.0f} CPU s\n")
    of_parts = [after - before for before, after in itertools.pairwise(marks)]
    return Trained(
        trainer=trainer,
        digits=digits,
        seconds=time.perf_counter() - began,
        cpu_seconds=marks[-1] - marks[0],
        quiet_cpu_seconds=NUM_PARTS * statistics.quantiles(of_parts, n=4)[0],
    )


def batches(split: Split, *, size: int = 250) -> Iterator[Batch]:
    """All of a split, in order."""
    for images, labels in zip(split.images.split(size), split.labels.split(size), strict=True):
        yield {"image": images, "label": labels}


def draw(trained: Trained, **options: Any) -> Tensor:
    """Samples of the averaged weights through the engine's tile, uint8 ``(N, 1, 28, 28)``; options of ``Generate``."""
    trainer = trained.trainer
    given = {"task": "generate", "model": "quality", "num_samples": NUM_SAMPLES} | options
    request = Generate.model_validate(given)
    draws = [Draw(request=request, index=index) for index in range(request.num_samples)]
    sampler = trainer.family.tasks["generate"](trainer.spec, trainer.data)
    tile = Tile(trainer.average, sampler, draws[0], trainer.device)
    images = {one.index: image for one, image in sample(tile, draws)}
    return torch.stack([images[index] for index in sorted(images)])


def edit(trained: Trained, task: str, inputs: Sequence[Mapping[str, Tensor]], **options: Any) -> Tensor:
    """What a task on images makes of each input, uint8 ``(N, 1, 28, 28)``."""
    trainer = trained.trainer
    given = {"task": task, "model": "quality", "dataset": "ds_" + "0" * 32} | options
    request: Any = REQUEST.validate_python(given)
    draws = [Draw(request=request, index=index, inputs=one) for index, one in enumerate(inputs)]
    tile = Tile(trainer.average, trainer.family.tasks[task](trainer.spec, trainer.data), draws[0], trainer.device)
    images = {one.index: image for one, image in sample(tile, draws)}
    return torch.stack([images[index] for index in sorted(images)])


def psnr(images: Tensor, originals: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the mean square error over all images."""
    error = ((images.double() - originals.double()) / 255).square().mean()
    return -10 * error.log10().item()


def fill_by_components(train: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """The masked pixels by the principal components of ``train`` that fit the others best (ridge regression).

    How many components, and how exactly they shall fit, are what fills a tenth of ``train`` best, given the rest.
    """
    others, tenth = train[len(train) // 10 :], train[: len(train) // 10]

    def error(choice: tuple[int, float]) -> float:
        return (_filled(others, tenth, mask, *choice) - tenth.double()).square().mean().item()

    return _filled(train, images, mask, *min(itertools.product(NUM_COMPONENTS, DEVIATIONS), key=error))


NUM_COMPONENTS: Final = (50, 100, 200, 400)
DEVIATIONS: Final = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 80.0)
"""Grey levels by which a pixel may differ from the components."""


def _filled(train: Tensor, images: Tensor, mask: Tensor, num_components: int, deviation: float) -> Tensor:
    flat, hidden = train.flatten(1).double(), mask.flatten().bool()
    mean = flat.mean(0)
    variance, basis = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    basis = basis[:, -num_components:].T * variance[-num_components:, None].clamp(min=0).sqrt()
    seen = basis[:, ~hidden]
    centred = images.flatten(1).double()[:, ~hidden] - mean[~hidden]
    codes = torch.linalg.solve(seen @ seen.T + deviation**2 * torch.eye(num_components), seen @ centred.T).T
    filled = images.flatten(1).double().clone()
    filled[:, hidden] = (codes @ basis + mean)[:, hidden].clamp(0, 255)
    return filled.view_as(images)


class Judge:
    """Compares samples to held-out digits in the features of the shipped classifier.

    ``way`` is 0 where samples are as far from the held-out digits as as many training digits are, and 1 where they are
    as far as noise with each pixel's mean and deviation.
    """

    def __init__(self, digits: Digits) -> None:
        self.features, self.digits = features.digits(), digits
        self.reference = self.features.of(digits.held_out.images)
        self._bounds: dict[int, tuple[float, float]] = {}

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Which share of them has these classes."""
        return (self.features.classes(images) == labels).double().mean().item()

    def distance(self, images: Tensor) -> float:
        """Frechet distance to the held-out digits."""
        return frechet_distance(self.features.of(images), self.reference)

    def bounds(self, num_samples: int) -> tuple[float, float]:
        """The distance of so many training digits, evenly spread, and of so many images of noise."""
        if num_samples not in self._bounds:
            train = self.digits.train.images
            evenly = torch.linspace(0, len(train) - 1, num_samples).long()
            self._bounds[num_samples] = self.distance(train[evenly]), self.distance(pixel_noise(train, num_samples))
        return self._bounds[num_samples]

    def measure(self, images: Tensor, labels: Tensor | None = None) -> Measures:
        """``fd``, its two calibrations, ``way``, classes; with the labels that were asked for the accuracy."""
        real, noise = self.bounds(len(images))
        fd = self.distance(images)
        classes = self.features.classes(images)
        shares = classes.bincount(minlength=NUM_CLASSES) / len(classes)
        figures: Measures = {
            "fd": fd,
            "fd_real": real,
            "fd_noise": noise,
            "way": (fd - real) / (noise - real),
            "num_samples": len(images),
            "class_shares": [round(share, 4) for share in shares.tolist()],
            "num_classes_seen": int((shares > 0).sum()),
            "largest_class": shares.max().item(),
        }
        if labels is not None:
            figures["class_accuracy"] = self.accuracy(images, labels)
        return figures


def losses(trained: Trained) -> Measures:
    """The family's losses and figures on all held-out digits, for the averaged weights."""
    return evaluate(trained.trainer, batches(trained.digits.held_out))


def linear_probe(encode: Callable[[Tensor], Tensor], digits: Digits) -> float:
    """Held-out accuracy of multinomial logistic regression on codes ``encode(images) -> (B, Z)`` (float64, L-BFGS)."""
    with torch.no_grad():
        train, held_out = (
            torch.cat([encode(images) for images in split.images.split(500)]).flatten(1).double()
            for split in (digits.train, digits.held_out)
        )
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    train, held_out = (train - mean) / deviation, (held_out - mean) / deviation
    weight = torch.zeros(train.shape[1], NUM_CLASSES, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(NUM_CLASSES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(train @ weight + bias, digits.train.labels) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    predicted = (held_out @ weight + bias).argmax(1)
    return (predicted == digits.held_out.labels).double().mean().item()

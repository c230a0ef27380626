"""The quality cases of families that learn from two datasets: what becomes of digits in the look of others.

Nothing is learnt from pairs: the first half of the digits are the contents, the other half in other looks the targets.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from bench import train_featnet
from bench.digits import Digits, Split
from bench.quality_parts import Judge, Measures, Trained, edit, train
from shared.specs import StyleSpec, TranslationSpec
from shared.specs.training import TrainSpec
from worker.engine.training import Trainer
from worker.metrics.networks import DIGITS, fill_from

SHOWN: Final = 500
"""Held-out digits that are given another look."""


def negative(images: Tensor) -> Tensor:
    return 255 - images


def thickened(images: Tensor) -> Tensor:
    """With strokes a pixel broader on each side."""
    return nn.functional.max_pool2d(images.float(), 3, stride=1, padding=1).byte()


def faded(images: Tensor) -> Tensor:
    """Of 40 % of the contrast, on grey."""
    return (images.float() * 0.4 + 80).byte()


def restored(images: Tensor) -> Tensor:
    """No longer faded, for a judge that knows white on black."""
    return ((images.float() - 80) / 0.4).clamp(0, 255).byte()


@dataclass(frozen=True)
class Second:
    """The second dataset of a training."""

    field: str
    """Of the spec."""
    looks: Callable[[Tensor], Tensor]
    """Makes it of digits."""
    begin: Callable[[Trainer[Any, Any]], None] = lambda trainer: None

    def train(self, spec: TrainSpec, digits: Digits, where: torch.device) -> Trained:
        """Train on the first half of the digits, and the others in another look."""
        half = len(digits.train) // 2
        first = Split(images=digits.train.images[:half], labels=digits.train.labels[:half])
        other = {self.field: self.looks(digits.train.images[half:])}
        return train(spec, Digits(train=first, held_out=digits.held_out), where, further=other, begin=self.begin)


def negatives_of(trained: Trained, judge: Judge) -> Measures:
    """How near translations are to the negatives of held-out digits, and whether they keep their class, both ways."""
    originals, labels = judge.digits.held_out.images[:SHOWN], judge.digits.held_out.labels[:SHOWN]
    there = edit(trained, "translate", [{"image": image} for image in originals], direction="to_target")
    back = edit(trained, "translate", [{"image": image} for image in negative(originals)], direction="to_source")
    trained.samples |= {"originals": originals, "negatives": there, "back": back}
    return {
        "grey_levels_off": grey_levels(there, negative(originals)),
        "class_kept": judge.accuracy(negative(there), labels),
        "class_kept_back": judge.accuracy(back, labels),
    }


STYLES: Final[Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]] = {
    "thick": (thickened, lambda images: images),
    "faded": (faded, restored),
}
"""What gives digits a look, and how a judge of white digits on black is shown those that have it."""


def styles(images: Tensor) -> Tensor:
    """A third each, in both looks and as negatives."""
    thick, pale, other = images.chunk(3)
    return torch.cat([thickened(thick), faded(pale), negative(other)])


def with_encoder(trainer: Trainer[Any, Any]) -> None:
    fill_from(DIGITS, trainer.net.encoder, trainer.average.encoder)


def drawn_in_styles(trained: Trained, judge: Judge) -> Measures:
    """Held-out digits as they are, and in the style of one that is thick or faded: their class and brightness."""
    originals, labels = judge.digits.held_out.images[:SHOWN], judge.digits.held_out.labels[:SHOWN]
    same = edit(trained, "reconstruct", [{"image": image} for image in originals])
    trained.samples |= {"originals": originals, "reconstructed": same}
    accuracy = independent(judge.digits)
    figures: Measures = {
        "judge_accuracy": accuracy(originals, labels),
        "grey_levels_off": grey_levels(same, originals),
        "class_kept": accuracy(same, labels),
    }
    for name, (look, shown) in STYLES.items():
        style = look(originals[:1])[0]
        made = edit(trained, "stylise", [{"image": image, "style": style} for image in originals], style=DATASETS[1])
        trained.samples[name] = made
        figures |= {
            f"{name}_class_kept": accuracy(shown(made), labels),
            f"{name}_brightness_off": abs(made.float().mean().item() - style.float().mean().item()),
        }
    return figures


def independent(digits: Digits) -> Callable[[Tensor, Tensor], float]:
    """The accuracy of a classifier that the model has not learned from, as it has from the shipped one: trained in the
    same way from another beginning."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = train_featnet.train(digits, torch.Generator().manual_seed(1))

    @torch.no_grad()
    def accuracy(images: Tensor, labels: Tensor) -> float:
        return (net(images).argmax(1) == labels).double().mean().item()

    return accuracy


def grey_levels(images: Tensor, others: Tensor) -> float:
    """The mean difference of two pixels."""
    return (images.float() - others.float()).abs().mean().item()


DATASETS: Final = ("ds_" + "0" * 32, "ds_" + "1" * 32)
TRANSLATION: Final = TranslationSpec(
    family="translation", model="translation", dataset=DATASETS[0], target_dataset=DATASETS[1], steps=150
)
STYLE: Final = StyleSpec(family="style", model="style", dataset=DATASETS[0], style_dataset=DATASETS[1], steps=600)
TO_NEGATIVES: Final = Second("target_dataset", negative)
OF_STYLES: Final = Second("style_dataset", styles, with_encoder)

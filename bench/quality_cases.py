"""The quality cases: what is trained, what is measured, what is asked of it.

A case is a spec, a function that measures the trained model, and thresholds; one whose training begins with another
model, or needs several, brings its own ``train``. Families add theirs below.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from bench.digits import Digits
from bench.quality_parts import Judge, Measures, Trained, draw, linear_probe, losses, train
from shared.specs import VaeSpec
from shared.specs.training import TrainSpec
from worker.families.vae import Vae, grey_levels

LONGEST: Final = 240.0
"""Seconds of training on a quiet machine with two cores that a case may take."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A threshold of one figure."""

    figure: str
    bound: float
    sense: Literal["at_most", "at_least"]

    def reached(self, figures: Mapping[str, Any]) -> bool:
        value = figures[self.figure]
        return value <= self.bound if self.sense == "at_most" else value >= self.bound


def at_most(figure: str, bound: float) -> Asked:
    return Asked(figure=figure, bound=bound, sense="at_most")


def at_least(figure: str, bound: float) -> Asked:
    return Asked(figure=figure, bound=bound, sense="at_least")


Measure = Callable[[Trained, Judge], Measures]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model, trained and measured."""

    spec: TrainSpec
    measure: Measure
    """Figures of the trained model; images it leaves in ``Trained.samples`` become sheets."""
    asked: Sequence[Asked]
    train: Callable[[TrainSpec, Digits, torch.device], Trained] = train
    """Trains the model that is measured; ``Trained.seconds`` are those of all training it takes."""


def fields(model: str, **fields: Any) -> dict[str, Any]:
    """What every spec must name, and ``fields``."""
    return {"dataset": "ds_" + "0" * 32, "model": model} | fields


# VAE ---------------------------------------------------------------------------------------------


def vae_figures(trained: Trained, judge: Judge) -> Measures:
    """-ELBO in nats per held-out image, samples of the prior, and what a linear probe reads from posterior means."""
    net: Vae = trained.trainer.average
    trained.samples["samples"] = draw(trained)
    probe = linear_probe(
        lambda images: net.encode(grey_levels(images.to(trained.trainer.device)))[0].cpu(), judge.digits
    )
    return losses(trained) | judge.measure(trained.samples["samples"]) | {"probe_accuracy": probe}


VAE_MLP: Final = Case(
    spec=VaeSpec(
        family="vae", network="mlp", hidden_dim=400, latent_dim=20, steps=12_000, batch_size=128, ema_decay=0.999,
        **fields("vae-mlp"),
    ),
    measure=vae_figures,
    asked=[at_most("loss", 108), at_least("probe_accuracy", 0.90)],
)  # fmt: skip

VAE_CONV: Final = Case(
    spec=VaeSpec(
        family="vae", network="conv", base_channels=32, latent_dim=16, steps=3000, batch_size=128, ema_decay=0.999,
        **fields("vae-conv"),
    ),
    measure=vae_figures,
    asked=[at_most("loss", 102), at_most("way", 0.15), at_least("probe_accuracy", 0.90)],
)  # fmt: skip


CASES: Final[Mapping[str, Case]] = {"vae-mlp": VAE_MLP, "vae-conv": VAE_CONV}


def device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

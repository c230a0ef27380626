"""The quality cases: what is trained, what is measured, what is asked of it.

A case is a spec, a function that measures the trained model, and thresholds; one whose training begins with another
model, or needs several, brings its own ``train``. Families add theirs below.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, Literal

import torch

from bench.digits import Digits
from bench.quality_gaussians import gaussians_figures, on_the_plane
from bench.quality_parts import (
    NUM_CLASSES,
    Judge,
    Measures,
    Trained,
    draw,
    edit,
    fill_by_components,
    linear_probe,
    losses,
    psnr,
    train,
)
from bench.quality_transfer import OF_STYLES, STYLE, TO_NEGATIVES, TRANSLATION, drawn_in_styles, negatives_of
from shared.specs import ConsistencySpec, DiffusionSpec, GanSpec, VaeSpec, VqSpec
from shared.specs.augmentation import Augmentation
from shared.specs.training import TrainSpec
from worker.engine.training import Trainer
from worker.families.family import Origin
from worker.families.vae import Vae, grey_levels

EDITED: Final = 200
"""Held-out digits that are edited."""
AVERAGED: Final = 16
"""Draws whose mean a restoration is."""
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


_trained: Callable[..., Trained] = cache(train)


def once(spec: TrainSpec, digits: Digits, where: torch.device) -> Trained:
    """Train a model that several cases look at; ``seconds`` stand for each of them."""
    return replace(_trained(spec, digits, where), samples={})


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
        family="vae", network="mlp", hidden_dim=400, latent_dim=20, steps=8000, batch_size=256, learning_rate=3e-3,
        weight_decay=0.15, ema_decay=0.999, **fields("vae-mlp"),
    ),
    measure=vae_figures,
    asked=[at_most("loss", 108), at_least("probe_accuracy", 0.90)],
)  # fmt: skip

VAE_CONV: Final = Case(
    spec=VaeSpec(
        family="vae", network="conv", base_channels=32, latent_dim=20, steps=4500, batch_size=64, learning_rate=2e-3,
        weight_decay=0.3, ema_decay=0.995, augmentation=Augmentation(shift=1), **fields("vae-conv"),
    ),
    measure=vae_figures,
    asked=[at_most("loss", 102), at_most("way", 0.15), at_least("probe_accuracy", 0.90)],
)  # fmt: skip


# GAN ---------------------------------------------------------------------------------------------


def gan_figures(trained: Trained, judge: Judge) -> Measures:
    """Samples without a class, so that all classes being there is the generator's own doing."""
    trained.samples["samples"] = draw(trained)
    return judge.measure(trained.samples["samples"])


def gan(name: str, **recipe: Any) -> Case:
    """Every class, none too often, and near the digits."""
    return Case(
        spec=GanSpec.model_validate({"family": "gan", "class_conditional": False, **recipe, **fields(name)}),
        measure=gan_figures,
        asked=[at_least("num_classes_seen", 10), at_most("largest_class", 0.20), at_most("way", 0.08)],
    )


DCGAN: Final = gan("dcgan", network="dcgan", steps=8000, batch_size=64, learning_rate=8e-4, ema_decay=0.998)
R3GAN: Final = gan(
    # Its objective on DCGAN's network: its own, below, sees a third of the images in the time.
    "r3gan",
    network="dcgan",
    objective="r3gan",
    steps=4900,
    batch_size=64,
    learning_rate=8e-4,
    gamma=0.2,
    gamma_end=0.02,
    penalty_every=4,
    ema_decay=0.998,
)
R3GAN_OWN: Final = gan(
    "r3gan-own-network", network="r3gan", base_channels=16, steps=4600, batch_size=64, learning_rate=8e-4, gamma=0.2,
    gamma_end=0.02, penalty_every=4, ema_decay=0.998,
)  # fmt: skip


def gaussians(seed: int) -> Case:
    """The objective of ``R3GAN`` on points in the plane."""
    spec = GanSpec(
        **fields("gaussians"), family="gan", network="mlp", precision="fp32", steps=26_000, seed=seed, batch_size=128,
        latent_dim=2, hidden_dim=256, learning_rate=8e-4, gamma=1.0, gamma_end=0.001, penalty_every=4, ema_decay=0.998,
    )  # fmt: skip
    asked = [at_least("modes", 24), at_least("high_quality", 0.85)]
    return Case(spec=spec, train=on_the_plane, measure=gaussians_figures, asked=asked)


# Diffusion ---------------------------------------------------------------------------------------

QUICK: Final[Mapping[str, Any]] = {"solver": "dpmpp_2m", "steps": 20, "num_samples": 1000}


def diffusion_figures(trained: Trained, judge: Judge) -> Measures:
    """Samples of all classes in turn; and with guidance, whether each is of the class that was asked for."""
    trained.samples["samples"] = draw(trained, **QUICK)
    trained.samples["guided"] = draw(trained, **QUICK, guidance_scale=2.0)
    asked = torch.arange(QUICK["num_samples"]) % NUM_CLASSES
    guided = judge.measure(trained.samples["guided"], asked)
    return judge.measure(trained.samples["samples"]) | {
        "guided_class_accuracy": guided["class_accuracy"],
        "guided_way": guided["way"],
    }


def diffusion(name: str, *, way: float, accuracy: float, **recipe: Any) -> Case:
    """Near the digits, and of the class that was asked for."""
    common = {"family": "diffusion", "batch_size": 32, "noise_mean": -0.6, "ema_decay": 0.995}
    return Case(
        spec=DiffusionSpec.model_validate({**common, **recipe, **fields(name)}),
        train=once,
        measure=diffusion_figures,
        asked=[at_most("way", way), at_least("guided_class_accuracy", accuracy)],
    )


UNET: Final = diffusion("diffusion-unet", way=0.04, accuracy=0.97, network="unet", steps=2400, learning_rate=3e-3)
DIT: Final = diffusion("diffusion-dit", way=0.08, accuracy=0.90, network="dit", steps=2000, learning_rate=2e-3)


def editing_figures(trained: Trained, judge: Judge) -> Measures:
    """Held-out digits with their lower half or half of their pixels masked, and reduced to a quarter: against what
    needs no model. Restorations are means of draws; figures of single draws, ``one_``, stand beside them."""
    originals, labels = judge.digits.held_out.images[:EDITED], judge.digits.held_out.labels[:EDITED]
    lower = torch.zeros(1, 28, 28, dtype=torch.uint8)
    lower[:, 14:] = 1
    scattered = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0)).lt(0.5).to(torch.uint8)
    figures: Measures = {}
    for name, mask in (("lower", lower), ("scattered", scattered)):
        inputs = [{"image": image, "mask": mask} for image in originals]
        filled = edit(trained, "inpaint", inputs, box=(0, 14, 28, 28), average_of=AVERAGED)
        trained.samples[f"one-inpainted-{name}"] = one = edit(trained, "inpaint", inputs, box=(0, 14, 28, 28))
        baseline = fill_by_components(judge.digits.train.images, originals, mask)
        mean = torch.where(mask.bool(), judge.digits.train.images.double().mean(0), originals.double())
        trained.samples[f"inpainted-{name}"] = filled
        figures |= {
            f"inpainting_{name}_psnr": psnr(filled, originals),
            f"inpainting_{name}_gain_over_mean": psnr(filled, originals) - psnr(mean, originals),
            f"inpainting_{name}_gain": psnr(filled, originals) - psnr(baseline, originals),
            f"inpainted_{name}_class_accuracy": judge.accuracy(filled, labels),
            f"one_inpainted_{name}_gain": psnr(one, originals) - psnr(baseline, originals),
            f"one_inpainted_{name}_class_accuracy": judge.accuracy(one, labels),
        }
    small = torch.nn.functional.avg_pool2d(originals.double(), 4)
    inputs = [{"image": image} for image in originals]
    enlarged = edit(trained, "super_resolve", inputs, factor=4, average_of=AVERAGED)
    one = edit(trained, "super_resolve", inputs, factor=4)
    cubic = torch.nn.functional.interpolate(small, size=(28, 28), mode="bicubic").clamp(0, 255)
    trained.samples |= {"originals": originals, "enlarged": enlarged}
    return figures | {
        "super_resolution_psnr": psnr(enlarged, originals),
        "super_resolution_gain": psnr(enlarged, originals) - psnr(cubic, originals),
        "one_super_resolution_gain": psnr(one, originals) - psnr(cubic, originals),
    }


EDITING: Final = Case(
    # Nobody tells the class of what is to be mended, so all of the training goes into images without one.
    spec=UNET.spec.model_copy(update={"class_conditional": False, "steps": 3000}),
    measure=editing_figures,
    asked=[
        at_least("inpainting_lower_gain_over_mean", 2),
        at_least("inpainting_scattered_gain_over_mean", 2),
        at_least("inpainting_lower_gain", 2),
        at_least("inpainting_scattered_gain", 2),
        at_least("super_resolution_gain", 2),
        at_least("inpainted_lower_class_accuracy", 0.80),
        at_least("inpainted_scattered_class_accuracy", 0.80),
    ],
)


# Consistency -------------------------------------------------------------------------------------


def tuned(spec: TrainSpec, digits: Digits, where: torch.device) -> Trained:
    """A diffusion model, then its tuning; ``seconds`` are those of the tuning, as of any other case."""
    teacher = once(UNET.spec, digits, where)
    origin = Origin(family="diffusion", spec=UNET.spec.model_dump(mode="json"), data=teacher.trainer.data)

    def begin(trainer: Trainer[Any, Any]) -> None:
        for net in (trainer.net, trainer.average):
            net.load_state_dict(teacher.trainer.average.state_dict())

    student = train(spec, digits, where, models={"init_from": origin}, begin=begin)
    student.samples["teacher"] = draw(teacher, num_samples=1000, solver="heun", steps=18)
    return student


def consistency_figures(trained: Trained, judge: Judge) -> Measures:
    """Two steps against the 35 evaluations of the model that was tuned."""
    trained.samples["samples"] = draw(trained, steps=2, num_samples=1000)
    teacher = judge.measure(trained.samples["teacher"])
    figures = judge.measure(trained.samples["samples"])
    return figures | {"teacher_fd": teacher["fd"], "fd_over_teacher": figures["fd"] / teacher["fd"]}


CONSISTENCY: Final = Case(
    spec=ConsistencySpec(
        family="consistency",
        init_from="teacher@1",
        steps=1300,
        batch_size=64,
        learning_rate=3e-4,
        ema_decay=0.995,
        stages=4,
        shrink=4,
        second_level=2.0,
        **fields("consistency"),
    ),
    measure=consistency_figures,
    asked=[at_most("fd_over_teacher", 1.3)],
    train=tuned,
)


# Codes -------------------------------------------------------------------------------------------


def vq_figures(trained: Trained, judge: Judge) -> Measures:
    """How many of the codes are used, and samples of the prior over them."""
    trained.samples["samples"] = draw(trained, num_samples=1000)
    figures = losses(trained)
    num_codes = trained.trainer.net.autoencoder.quantizer.num_codes
    return (
        figures
        | judge.measure(trained.samples["samples"])
        | {"perplexity_share": figures["perplexity"] / num_codes, "num_codes": num_codes}
    )


def vq(name: str, asked: Sequence[Asked], **recipe: Any) -> Case:
    """An autoencoder of codes and its prior."""
    common = {"family": "vq", "batch_size": 64, "learning_rate": 2e-3, "ema_decay": 0.99}
    return Case(
        spec=VqSpec.model_validate({**common, **recipe, **fields(name)}),
        measure=vq_figures,
        asked=[*asked, at_most("way", 0.15)],
    )


FSQ: Final = vq("vq-fsq", [at_least("usage", 0.90)], levels=(8, 6, 5), steps=600)
EMA: Final = vq(
    "vq-ema", [at_least("perplexity_share", 0.50)], quantizer="ema", codebook_size=64, halvings=3, dead_below=0.3,
    steps=600,
)  # fmt: skip


# Two datasets ------------------------------------------------------------------------------------

NEGATIVES: Final = Case(
    spec=TRANSLATION,
    train=TO_NEGATIVES.train,
    measure=negatives_of,
    asked=[at_most("grey_levels_off", 25), at_least("class_kept", 0.85), at_least("class_kept_back", 0.85)],
)
STYLES: Final = Case(
    spec=STYLE,
    train=OF_STYLES.train,
    measure=drawn_in_styles,
    asked=[
        at_most("grey_levels_off", 20),
        at_least("class_kept", 0.90),
        *(at_least(f"{look}_class_kept", 0.75) for look in ("thick", "faded")),
        *(at_most(f"{look}_brightness_off", 10) for look in ("thick", "faded")),
    ],
)


CASES: Final[Mapping[str, Case]] = {
    "vae-mlp": VAE_MLP,
    "vae-conv": VAE_CONV,
    "dcgan": DCGAN,
    "r3gan": R3GAN,
    "r3gan-own-network": R3GAN_OWN,
    **{f"r3gan-gaussians-{seed}": gaussians(seed) for seed in range(3)},
    "diffusion-unet": UNET,
    "diffusion-dit": DIT,
    "diffusion-editing": EDITING,
    "consistency": CONSISTENCY,
    "vq-fsq": FSQ,
    "vq-ema": EMA,
    "translation": NEGATIVES,
    "style": STYLES,
}


def device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

"""Diffusion in the latents of a trained autoencoder: the same mathematics in another space."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from pydantic_core import PydanticCustomError
from torch import Tensor

from shared.specs import FAMILIES as SPECS
from shared.specs.consistency import ConsistencySpec
from shared.specs.tasks import Generate, ImageToImage, Reconstruct
from shared.specs.training import Trained
from tests.families.test_diffusion import CPU, DATASET, spec_of
from tests.families.test_editing import REQUESTS
from worker.engine.numerics import exact
from worker.engine.sampling import Tile, sample
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.diffusion import FAMILY, loss
from worker.families.family import DataInfo, Draw, Origin
from worker.families.nets.latents import LatentDenoiser, space_of
from worker.kernels.noise import Domain, Noise

SHAPE = (1, 12, 12)
KEYED = Noise.of_step(Domain.TRAINING, 5, 0, range(6), CPU)
BATCH = {"image": (KEYED.uniform(*SHAPE, stream=77) * 256).to(torch.uint8), "label": torch.arange(6) % 3}
BASES: Mapping[str, dict[str, Any]] = {
    "vector": {"family": "vae", "network": "mlp", "hidden_dim": 16, "latent_dim": 5},
    "conv": {"family": "vae", "likelihood": "gaussian", "base_channels": 8, "latent_dim": 3},
    "fsq": {"family": "vq", "levels": (5, 5, 3)},
    "ema": {"family": "vq", "quantizer": "ema", "code_dim": 4, "codebook_size": 8},
}
SPACES = {"vector": (5, 1, 1), "conv": (3, 1, 1), "fsq": (3, 3, 3), "ema": (4, 3, 3)}


def origin_of(base: str) -> Origin:
    spec = SPECS[BASES[base]["family"]].model_validate({"dataset": DATASET, "model": "base", **BASES[base]})
    return Origin(family=BASES[base]["family"], spec=spec.model_dump(mode="json"), data=DataInfo(shape=SHAPE))


def data_of(base: str) -> DataInfo:
    return DataInfo(shape=SHAPE, num_classes=3, models={"autoencoder": origin_of(base)})


def built(base: str, **fields: Any) -> tuple[Any, LatentDenoiser]:
    """A spec and its network, which has begun: no weight of its denoiser is zero."""
    spec = spec_of(autoencoder="base@1", **fields)
    net: Any = build(FAMILY, spec, data_of(base))
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.network.parameters():
            parameter.add_(torch.empty_like(parameter).uniform_(-0.1, 0.1, generator=chance))
    net.train().encode(BATCH["image"])
    return spec, net.eval()


@pytest.mark.parametrize("base", BASES)
def test_the_space_is_known_without_weights(base: str) -> None:
    spec, net = built(base)

    assert space_of(spec, data_of(base)) == SPACES[base]
    assert net.encode(BATCH["image"]).shape == (6, *SPACES[base])


@pytest.mark.parametrize(("objective", "deviation"), [("edm", 0.7), ("v", 1.0), ("flow", 1.0)])
@pytest.mark.parametrize("base", ["conv", "fsq"])
def test_latents_have_the_deviation_that_the_objective_reckons_with(
    base: str, objective: str, deviation: float
) -> None:
    _, net = built(base, objective=objective, sigma_data=0.7)

    latents = net.encode(BATCH["image"])

    assert latents.mean().item() == pytest.approx(0, abs=1e-6)
    assert latents.std(correction=0).item() == pytest.approx(deviation, rel=1e-5)


def test_the_first_batch_alone_decides_about_the_scale() -> None:
    _, net = built("fsq")
    before = net.encode(BATCH["image"])

    net.train().encode(BATCH["image"] // 3)

    assert torch.equal(net.eval().encode(BATCH["image"]), before)


@pytest.mark.parametrize("base", BASES)
def test_what_is_encoded_decodes_to_the_reconstruction_of_the_autoencoder(base: str) -> None:
    _, net = built(base)
    family, spec = FAMILIES[BASES[base]["family"]], SPECS[BASES[base]["family"]]
    request = Reconstruct(task="reconstruct", model="m", dataset=DATASET)
    draws = [Draw(request=request, index=index, inputs={"image": x}) for index, x in enumerate(BATCH["image"])]
    sampler = family.tasks["reconstruct"](spec.model_validate(origin_of(base).spec), DataInfo(shape=SHAPE))

    decoded = net.decode(net.encode(BATCH["image"]))

    theirs = sampler.finish(net.autoencoder, sampler.step(net.autoencoder, sampler.start(draws, KEYED), KEYED))
    assert (decoded.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize(("base", "network"), [("conv", "unet"), ("fsq", "unet"), ("ema", "dit")])
def test_every_weight_but_the_autoencoders_gets_a_gradient(base: str, network: str) -> None:
    spec, net = built(base, network=network, label_dropout=0.5)

    loss(spec, net.train(), BATCH, KEYED).loss.backward()

    dead = {name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert {name for name in dead if not name.startswith("autoencoder.")} <= attention_of_one(net)
    assert all(weight.grad is None for weight in net.autoencoder.parameters())


def attention_of_one(net: LatentDenoiser) -> set[str]:
    """Weights that choose among tokens have nothing to choose where there is one."""
    if net.autoencoder.latent_shape[1:] != (1, 1):
        return set()
    return {name for name, _ in net.named_parameters() if ".norm_q." in name or ".norm_k." in name}


def drawn(net: LatentDenoiser, sampler: Any, draws: list[Draw[Any]]) -> list[Tensor]:
    done = {draw.index: image for draw, image in sample(Tile(net, sampler, draws[0], CPU), draws)}
    return [done[draw.index] for draw in draws]


@pytest.mark.parametrize("base", ["conv", "fsq"])
def test_a_sample_alone_equals_itself_in_company_whatever_the_task(base: str) -> None:
    spec, net = built(base)
    given = {"model": "m", "dataset": DATASET}
    requests = [
        Generate(task="generate", model="m", steps=3, guidance_scale=2.0),
        ImageToImage(task="image_to_image", steps=3, **given),
        Reconstruct(task="reconstruct", **given),
    ]
    with exact(1):
        for request in requests[: 2 if base == "conv" else 3]:
            sampler = FAMILY.tasks[request.task](spec, data_of(base))
            images = [None if request.task == "generate" else {"image": x} for x in BATCH["image"]]
            # More than a tile holds: the last ones enter while others are under way.
            draws = [Draw(request=request, index=index, inputs=images[index % 6]) for index in range(10)]
            together, alone = drawn(net, sampler, draws), drawn(net, sampler, draws[9:])
            assert together[9].shape == SHAPE
            assert torch.equal(together[9], alone[0])


def test_guidance_and_classes_change_what_is_drawn() -> None:
    spec, net = built("fsq", objective="flow")
    sampler = FAMILY.tasks["generate"](spec, data_of("fsq"))

    def image(**options: Any) -> Tensor:
        request = Generate(task="generate", model="m", steps=3, **options)
        return drawn(net, sampler, [Draw(request=request, index=0)])[0]

    pictures = [image(labels=[0]), image(labels=[1]), image(labels=[1], guidance_scale=3.0)]
    assert not torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[1], pictures[2])


# Spec --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "options"), [("inpaint", {"box": (0, 0, 2, 2)}), ("super_resolve", {}), ("colourise", {})]
)
def test_editing_by_pixels_is_refused(task: str, options: dict[str, Any]) -> None:
    request = REQUESTS[task](task=task, model="m", dataset=DATASET, **options)

    with pytest.raises(PydanticCustomError, match="pixels") as refused:
        spec_of(autoencoder="base@1").check_task(request, {"shape": [3, 8, 8], "num_classes": 0})

    assert refused.value.context["field"] == "task"


@pytest.mark.parametrize("kind", [Reconstruct, ImageToImage])
def test_editing_of_whole_images_is_not(kind: Any) -> None:
    request = kind(task=kind.model_fields["task"].annotation.__args__[0], model="m", dataset=DATASET)

    spec_of(autoencoder="base@1").check_task(request, {"shape": [3, 8, 8], "num_classes": 0})


INFO = {"shape": [1, 12, 12], "num_classes": 3}


def denoising(**fields: Any) -> Trained:
    """A diffusion model that a training names."""
    return Trained(spec=spec_of(**fields), info=INFO)


def coding(**fields: Any) -> Trained:
    """An autoencoder that it names."""
    return Trained(spec=SPECS[fields["family"]].model_validate({"dataset": DATASET, "model": "m", **fields}), info=INFO)


@pytest.mark.parametrize(
    ("models", "field"),
    [
        ({"autoencoder": coding(family="vae", network="ladder")}, "autoencoder"),
        ({"autoencoder": coding(family="vae"), "init_from": denoising(autoencoder="other@1")}, "autoencoder"),
        ({"autoencoder": coding(family="vq"), "init_from": denoising()}, "autoencoder"),
        ({"autoencoder": coding(family="vae"), "init_from": denoising(autoencoder="base@1")}, None),
        ({"autoencoder": coding(family="vq")}, None),
    ],
)
def test_the_models_that_a_training_names_must_fit(models: dict[str, Trained], field: str | None) -> None:
    spec = spec_of(autoencoder="base@1")

    if field is None:
        spec.check_references(models, INFO)
        return
    with pytest.raises(PydanticCustomError) as refused:
        spec.check_references(models, INFO)
    assert refused.value.context["field"] == field


@pytest.mark.parametrize(("before", "now"), [(0.0, 0.1), (0.1, 0.0)])
def test_a_model_goes_on_being_told_of_augmentation_or_not(before: float, now: float) -> None:
    spec = spec_of(init_from="drawn@1", augment=now)

    spec.check_references({"init_from": denoising(augment=now / 2)}, INFO)
    with pytest.raises(PydanticCustomError) as refused:
        spec.check_references({"init_from": denoising(augment=before)}, INFO)
    assert refused.value.context is not None and refused.value.context["field"] == "augment"


def test_a_model_that_works_in_latents_is_not_tuned() -> None:
    spec = ConsistencySpec(family="consistency", dataset=DATASET, model="m", init_from="drawn@1")

    spec.check_references({"init_from": denoising()}, INFO)
    with pytest.raises(PydanticCustomError, match="latents"):
        spec.check_references({"init_from": denoising(autoencoder="base@1")}, INFO)


def test_latents_are_not_augmented() -> None:
    assert spec_of(augment=0.1).autoencoder is None
    with pytest.raises(ValidationError, match="latents"):
        spec_of(augment=0.1, autoencoder="base@1")

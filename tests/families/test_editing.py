"""Editing without training: what is known of an image stays known, and the rest is the model's."""

from typing import Any

import pytest
import torch
from pydantic_core import PydanticCustomError
from torch import Tensor

from shared.specs.tasks import Colourise, Generate, ImageToImage, Inpaint, SuperResolve
from tests.families.test_diffusion import CPU, spec_of, trained
from worker.engine.sampling import Tile, sample
from worker.families.diffusion import FAMILY
from worker.families.family import DataInfo, Draw
from worker.families.nets.measurements import agreeing, averaged, enlarged, grey, in_range, kept, reduced
from worker.kernels.noise import Domain, Noise

COLOURS = DataInfo(shape=(3, 8, 8), num_classes=3)
GREYS = DataInfo(shape=(1, 8, 8))
DATASET = "ds_" + "0" * 32
REQUESTS = {"inpaint": Inpaint, "super_resolve": SuperResolve, "colourise": Colourise, "image_to_image": ImageToImage}


def pictures(number: int, *shape: int) -> Tensor:
    keyed = Noise.of_step(Domain.TRAINING, 3, 0, range(number), CPU)
    return (keyed.uniform(*shape) * 256).to(torch.uint8)


def edit(
    task: str, inputs: list[dict[str, Tensor]], *, data: DataInfo = COLOURS, width: int = 4, **fields: Any
) -> Tensor:
    """One result per input, of a network with random weights."""
    spec = spec_of(network="unet")
    request = REQUESTS[task](task=task, model="m", dataset=DATASET, seed=4, steps=6, **fields)
    draws = [Draw(request=request, index=index, inputs=one) for index, one in enumerate(inputs)]
    tile = Tile(trained(spec, data), FAMILY.tasks[task](spec, data), draws[0], CPU, width=4)
    done = {draw.index: image for draw, image in sample(tile, draws)}
    return torch.stack([done[index] for index in range(len(inputs))])


def test_known_pixels_are_kept_to_the_bit_and_the_others_are_filled() -> None:
    images = pictures(3, 3, 8, 8)
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[:, :, 4:] = 1

    filled = edit("inpaint", [{"image": image, "mask": mask} for image in images], box=(4, 0, 8, 8))

    assert torch.equal(filled[..., :4], images[..., :4])
    assert (filled[..., 4:] != images[..., 4:]).float().mean() > 0.5


def test_what_lies_under_the_mask_is_not_looked_at() -> None:
    image = pictures(1, 3, 8, 8)[0]
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[:, 2:6, 2:6] = 1
    other = torch.where(mask == 1, 255 - image, image)

    one, two = (
        edit("inpaint", [{"image": image, "mask": mask}], box=(2, 2, 6, 6)),
        edit("inpaint", [{"image": other, "mask": mask}], box=(2, 2, 6, 6)),
    )

    assert torch.equal(one, two)


@pytest.mark.parametrize("factor", [2, 4])
def test_an_enlarged_image_is_its_input_when_reduced(factor: int) -> None:
    small = pictures(2, 3, 8 // factor, 8 // factor) // 2 + 64

    large = edit("super_resolve", [{"image": image} for image in small], factor=factor)

    reduced_again = reduced(large.double() / 255, factor)
    # What leaves the range of bytes is cut off, which a network with random weights does everywhere.
    inside = (enlarged(large.double(), 1) % 255 != 0).float()
    untouched = reduced(inside, factor) == 1
    assert untouched.any()
    assert ((reduced_again - small / 255)[untouched] ** 2).mean() < 1e-3


def saturated(number: int, *shape: int) -> Tensor:
    """Pictures of black and white alone."""
    return (pictures(number, *shape) > 127).to(torch.uint8) * 255


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_saturated_input_is_what_its_enlargement_is_reduced_to(factor: int) -> None:
    small = saturated(3, 3, 8 // factor, 8 // factor)

    large = edit("super_resolve", [{"image": image} for image in small], factor=factor, average_of=2)

    assert ((reduced(large.double(), factor) - small) / 255).square().mean() < 1e-3
    near = small.float().sub(127.5).abs().sub(120).clamp(min=0)
    assert torch.equal(reduced(large.double(), factor)[near > 0], small.double()[near > 0])


@pytest.mark.parametrize("image", [saturated(1, 1, 8, 8)[0], saturated(1, 3, 8, 8)[0], pictures(1, 3, 8, 8)[0]])
def test_a_saturated_input_is_what_its_colours_average_to(image: Tensor) -> None:
    coloured = edit("colourise", [{"image": image}])[0]

    measured = image.double().mean(0)
    assert ((coloured.double().mean(0) - measured) / 255).square().mean() < 1e-5
    assert (coloured[0] != coloured[1]).any() or measured.unique().tolist() == [0, 255]


@pytest.mark.parametrize("factor", [2, 4])
def test_an_enlargement_has_the_means_of_any_input(factor: int) -> None:
    """The network with random weights leaves the range of bytes nearly everywhere."""
    small = pictures(2, 3, 8 // factor, 8 // factor)

    large = edit("super_resolve", [{"image": image} for image in small], factor=factor)

    assert ((large == 0) | (large == 255)).float().mean() > 0.1
    assert (reduced(large.double(), factor) - small).abs().max() <= 0.5


def test_what_is_brought_into_range_is_the_nearest_image_with_the_means() -> None:
    """Against the solution by a general method: a shift for each mean, by the order of the values."""
    keyed = Noise.of_step(Domain.TRAINING, 3, 0, range(2), CPU)
    image = 3 * keyed.normal(3, 4, 4).double()
    known = averaged(2)(keyed.uniform(3, 4, 4, stream=1).double() * 2 - 1)

    near = in_range(image, known, averaged(2))

    assert near.abs().max() <= 1
    assert torch.allclose(averaged(2)(near), known, atol=1e-12)
    # Optimal: within a square all that lie inside have moved alike, those at the ends at least as far beyond.
    moved = (near - image).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(0, 3)
    values = near.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(0, 3)
    for square, shifts in zip(values, moved, strict=True):
        inside = shifts[square.abs() < 1]
        if len(inside):
            assert torch.allclose(inside, inside[:1], atol=1e-9)
            assert (shifts[square == 1] <= inside[0] + 1e-9).all()
            assert (shifts[square == -1] >= inside[0] - 1e-9).all()


def test_what_lies_in_range_stays_as_it_is() -> None:
    image = Noise.of_step(Domain.TRAINING, 3, 0, range(2), CPU).uniform(3, 4, 4).double() * 2 - 1
    one_out = image.clone()
    one_out[0, 0, 0, 0] = 1.5

    assert torch.equal(in_range(image, averaged(2)(image), averaged(2)), image)
    assert torch.equal(in_range(one_out, averaged(2)(image), averaged(2))[:, :, 2:], one_out[:, :, 2:])


def test_an_input_of_the_models_size_is_reduced_first() -> None:
    large = enlarged(pictures(1, 3, 4, 4), 2)

    assert torch.equal(
        edit("super_resolve", [{"image": large[0]}], factor=2),
        edit("super_resolve", [{"image": large[0, :, ::2, ::2]}], factor=2),
    )


def test_factors_share_a_tile() -> None:
    spec, images = spec_of(network="unet"), pictures(2, 3, 8, 8)
    draws = [
        Draw(
            request=SuperResolve(task="super_resolve", model="m", dataset=DATASET, seed=7, steps=steps, factor=factor),
            index=0,
            inputs={"image": image},
        )
        for image, factor, steps in zip(images, (2, 4), (3, 5), strict=True)
    ]
    net, sampler = trained(spec, COLOURS), FAMILY.tasks["super_resolve"](spec, COLOURS)
    alone = [next(sample(Tile(net, sampler, draws[0], CPU, width=4), [draw]))[1] for draw in draws]

    together = {draw.request.factor: image for draw, image in sample(Tile(net, sampler, draws[1], CPU, width=4), draws)}

    assert torch.equal(together[2], alone[0]) and torch.equal(together[4], alone[1])


def test_colours_keep_the_grey_of_the_input() -> None:
    image = pictures(1, 1, 8, 8)[0] // 4 + 96

    coloured = edit("colourise", [{"image": image}])[0]

    inside = ((coloured > 0) & (coloured < 255)).all(0)
    assert inside.any()
    assert (coloured.float().mean(0) - image[0])[inside].abs().max() <= 0.5
    assert (coloured[0] != coloured[1]).any()


def test_a_coloured_input_is_seen_in_grey() -> None:
    grey_image = pictures(1, 1, 8, 8)[0] // 2
    coloured = torch.cat([grey_image + 10, grey_image, grey_image + 20])

    assert torch.equal(edit("colourise", [{"image": coloured}]), edit("colourise", [{"image": grey_image + 10}]))


def test_the_weaker_an_edit_the_nearer_it_stays() -> None:
    images = [{"image": image} for image in pictures(2, 3, 8, 8)]

    distances = [
        (edit("image_to_image", images, strength=strength).float() - torch.stack([one["image"] for one in images]))
        .abs()
        .mean()
        for strength in (0.2, 0.5, 1.0)
    ]

    assert distances[0] < 2
    assert distances == sorted(distances) and distances[0] < distances[-1]


@pytest.mark.parametrize("solver", ["heun", "ddpm", "ddim"])
def test_all_of_the_way_is_plain_generation_from_the_seed(solver: str) -> None:
    images = pictures(3, 3, 8, 8)
    edited = edit("image_to_image", [{"image": image} for image in images], strength=1, labels=[2, 0], solver=solver)

    spec = spec_of(network="unet")
    request = Generate(task="generate", model="m", seed=4, steps=6, labels=[2, 0], solver=solver, num_samples=3)
    draws = [Draw(request=request, index=index) for index in range(3)]
    tile = Tile(trained(spec, COLOURS), FAMILY.tasks["generate"](spec, COLOURS), draws[0], CPU, width=4)
    drawn = {draw.index: image for draw, image in sample(tile, draws)}
    assert torch.equal(edited, torch.stack([drawn[index] for index in range(3)]))


def test_nearly_all_of_the_way_keeps_something() -> None:
    image = [{"image": pictures(1, 3, 8, 8)[0]}]

    assert not torch.equal(edit("image_to_image", image, strength=0.99), edit("image_to_image", image, strength=1))


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"strength": 0.02}, True),
        ({"strength": 0.03}, False),
        ({"strength": 0.02, "solver": "ddim"}, False),
        ({"strength": 0.009, "solver": "ddim"}, True),
        ({"strength": 0.4, "steps": 1}, True),
        ({"strength": 0.6, "steps": 1}, False),
        ({"strength": 0.001, "steps": 1000}, False),
    ],
)
def test_a_strength_of_no_step_is_refused(fields: dict[str, Any], refused: bool) -> None:
    request = ImageToImage(task="image_to_image", model="m", dataset=DATASET, **fields)

    if not refused:
        spec_of().check_task(request, COLOURS.as_json())
        return
    with pytest.raises(PydanticCustomError) as error:
        spec_of().check_task(request, COLOURS.as_json())
    assert error.value.context is not None and error.value.context["field"] == "strength"


def test_images_without_colours_cannot_be_coloured() -> None:
    request = Colourise(task="colourise", model="m", dataset=DATASET)

    with pytest.raises(PydanticCustomError, match="no colours"):
        spec_of().check_task(request, GREYS.as_json())


def test_a_size_that_the_factor_does_not_divide_is_refused() -> None:
    request = SuperResolve(task="super_resolve", model="m", dataset=DATASET, factor=8)

    with pytest.raises(PydanticCustomError, match="multiples"):
        request.input_shapes((1, 28, 28))


@pytest.mark.parametrize(
    "projection", [kept(pictures(1, 1, 8, 8) % 2), averaged(2), averaged(4), grey], ids=["kept", "2", "4", "grey"]
)
def test_agreeing_is_a_projection_onto_what_was_measured(projection: Any) -> None:
    keyed = Noise.of_step(Domain.TRAINING, 3, 0, range(2), CPU)
    image, estimate = keyed.normal(3, 8, 8).double(), keyed.normal(3, 8, 8, stream=1).double()
    known = projection(image)

    agreed = agreeing(estimate, known, projection)

    assert torch.allclose(projection(known), known, atol=1e-12)
    assert torch.allclose(projection(agreed), known, atol=1e-12)
    assert torch.allclose(agreed - known, estimate - projection(estimate), atol=1e-12)


class Correlated(torch.nn.Module):
    """The exact denoiser of neighbouring pixels with normal values: ``S (S + sigma^2 I)^-1 x``."""

    def __init__(self, covariance: Tensor) -> None:
        super().__init__()
        self.values, self.axes = torch.linalg.eigh(covariance)
        self.num_classes = 0

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        shrunk = self.values / (self.values + sigma[:, None] ** 2)
        return (((x.flatten(1) @ self.axes) * shrunk) @ self.axes.T).view_as(x)

    def decode(self, x: Tensor) -> Tensor:
        return x


def test_what_is_filled_in_is_drawn_given_what_is_known() -> None:
    deviation, correlation, num_draws = 0.4, 0.9, 400
    covariance = deviation**2 * torch.tensor([[1, correlation], [correlation, 1]], dtype=torch.float64)
    spec, plane = spec_of(network="unet", class_conditional=False), DataInfo(shape=(1, 1, 2))
    inputs = {
        "image": torch.tensor([[[166, 0]]], dtype=torch.uint8),
        "mask": torch.tensor([[[0, 1]]], dtype=torch.uint8),
    }
    request = Inpaint(task="inpaint", model="m", dataset=DATASET, box=(1, 0, 2, 1), steps=50)
    draws = [Draw(request=request, index=index, inputs=inputs) for index in range(num_draws)]
    tile = Tile(Correlated(covariance), FAMILY.tasks["inpaint"](spec, plane), draws[0], CPU, width=num_draws)

    filled = torch.stack([image for _, image in sample(tile, draws)])[:, 0, 0, 1]

    known = 166 / 127.5 - 1
    assert filled.mean().item() == pytest.approx(correlation * known, abs=0.04)
    assert filled.std().item() == pytest.approx(deviation * (1 - correlation**2) ** 0.5, rel=0.35)


def test_a_mean_of_draws_keeps_what_is_known_and_is_nearer_to_what_is_likely() -> None:
    covariance = 0.04 * torch.tensor([[1, 0.5], [0.5, 1]], dtype=torch.float64)
    spec, plane = spec_of(network="unet", class_conditional=False), DataInfo(shape=(1, 1, 2))
    inputs = {
        "image": torch.tensor([[[166, 0]]], dtype=torch.uint8),
        "mask": torch.tensor([[[0, 1]]], dtype=torch.uint8),
    }

    def spread_of(average_of: int) -> float:
        request = Inpaint(task="inpaint", model="m", dataset=DATASET, box=(1, 0, 2, 1), steps=6, average_of=average_of)
        draws = [Draw(request=request, index=index, inputs=inputs) for index in range(100)]
        tile = Tile(Correlated(covariance), FAMILY.tasks["inpaint"](spec, plane), draws[0], CPU, width=100)
        filled = torch.stack([image for _, image in sample(tile, draws)])
        assert torch.allclose(filled[..., 0], torch.tensor(166 / 127.5 - 1, dtype=torch.float64))
        return filled[..., 1].std().item()

    assert spread_of(16) == pytest.approx(spread_of(1) / 4, rel=0.35)


def test_more_passes_than_slots_have_rows_for_are_refused() -> None:
    Inpaint(task="inpaint", model="m", dataset=DATASET, box=(0, 0, 2, 1), average_of=40)

    with pytest.raises(ValueError, match="more than 1000"):
        Inpaint(task="inpaint", model="m", dataset=DATASET, box=(0, 0, 2, 1), average_of=41)


@pytest.mark.parametrize("task", ["inpaint", "super_resolve", "colourise"])
def test_a_restoration_does_not_depend_on_its_neighbours(task: str) -> None:
    spec, images = spec_of(network="unet"), pictures(6, 3, 8, 8)
    mask = (pictures(1, 1, 8, 8)[0] > 99).to(torch.uint8)
    fields: dict[str, Any] = {"inpaint": {"box": (0, 0, 3, 3)}, "super_resolve": {"factor": 2}}.get(task, {})
    draws = [
        Draw(
            request=REQUESTS[task](
                task=task, model="m", dataset=DATASET, seed=seed, steps=3 + seed, average_of=1 + seed % 2, **fields
            ),
            index=seed,
            inputs={"image": image, "mask": mask},
        )
        for seed, image in enumerate(images)
    ]
    net, sampler = trained(spec, COLOURS), FAMILY.tasks[task](spec, COLOURS)

    together = {draw.index: image for draw, image in sample(Tile(net, sampler, draws[0], CPU), draws)}

    for draw in (draws[0], draws[5]):
        assert torch.equal(next(sample(Tile(net, sampler, draw, CPU), [draw]))[1], together[draw.index])

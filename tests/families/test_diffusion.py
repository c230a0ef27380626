"""Diffusion as mathematics: losses against float64, known distributions, orders of convergence, equal bits."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from shared.specs.diffusion import DiffusionSpec
from shared.specs.tasks import Encode, Generate, Interpolate, Reconstruct
from worker.engine.numerics import exact
from worker.engine.sampling import Tile, sample
from worker.families.diffusion import FAMILY, build, loss
from worker.families.family import DataInfo, Draw
from worker.families.nets.denoiser import Denoiser, centred, spread, to_bytes
from worker.families.nets.dropout import Dropout
from worker.families.nets.preconditioning import Edm, ddpm_log_sigmas
from worker.kernels.noise import Domain, Noise

CPU = torch.device("cpu")
DATASET = "ds_" + "0" * 32
TINY = DataInfo(shape=(1, 8, 8), num_classes=3)
KEYED = Noise.of_step(Domain.TRAINING, 5, 0, range(6), CPU)
BATCH = {"image": (KEYED.uniform(*TINY.shape, stream=77) * 256).to(torch.uint8), "label": torch.arange(6) % 3}


def spec_of(**fields: Any) -> DiffusionSpec:
    return DiffusionSpec(family="diffusion", dataset=DATASET, model="m", **fields)


def trained(spec: DiffusionSpec, data: DataInfo = TINY) -> Denoiser:
    """A network none of whose layers is zero."""
    net = build(spec, data).eval().requires_grad_(requires_grad=False)
    for number, parameter in enumerate(net.parameters()):
        drawn = Noise.of_step(Domain.TRAINING, 1, number, range(1), CPU).normal(*parameter.shape)[0]
        parameter.copy_(
            parameter.round() + 0.1 * drawn if parameter.ndim == 1 else drawn * parameter[0].numel() ** -0.5
        )
    return net


# Loss --------------------------------------------------------------------------------------------


def reference(spec: DiffusionSpec, net: Denoiser) -> Tensor:
    """The losses as their papers write them, in float64 and in the papers' own coordinates."""
    network = deepcopy(net.network).double()
    x0, n = BATCH["image"].double() / 255 * 2 - 1, KEYED.normal(*TINY.shape, stream=0).double()
    hidden = KEYED.uniform(stream=2) < spec.label_dropout
    label = torch.where(hidden, 3, BATCH["label"])
    if spec.objective in ("edm", "flow"):
        mean, std = {"edm": (-1.2, 1.2), "flow": (0.0, 1.0)}[spec.objective]
        normal = mean + std * KEYED.normal(stream=3).double()
        if spec.objective == "flow":
            t = spread(normal.sigmoid())
            return (network((1 - t) * x0 + t * n, 1000 * t.flatten(), label) - (n - x0)).square().mean()
        sigma, data = spread(normal.exp()), spec.sigma_data
        total = sigma**2 + data**2
        output = network((x0 + sigma * n) / total.sqrt(), normal / 4, label)
        denoised = data**2 / total * (x0 + sigma * n) + sigma * data / total.sqrt() * output
        return (total / (sigma * data) ** 2 * (denoised - x0).square()).mean()
    time = (KEYED.uniform(stream=3) * 1000).long()
    signal = spread((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[time])
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    target = {"eps": n, "v": alpha * n - sigma * x0, "x0": x0}[spec.objective]
    return (network(alpha * x0 + sigma * n, time, label) - target).square().mean()


@pytest.mark.parametrize("objective", ["edm", "eps", "v", "x0", "flow"])
@pytest.mark.parametrize("network", ["unet", "dit"])
def test_the_loss_is_the_papers_in_float64(network: str, objective: str) -> None:
    spec = spec_of(network=network, objective=objective, label_dropout=0.5)
    net = trained(spec)

    measured = loss(spec, net, BATCH, KEYED)

    assert measured.loss.item() == pytest.approx(reference(spec, net).item(), rel=1e-5)


@pytest.mark.parametrize("objective", ["edm", "eps", "v", "x0", "flow"])
def test_a_network_that_says_the_target_denoises_exactly(objective: str) -> None:
    """Whatever F is: with it right, D is the clean image at any noise level."""
    net, x0 = build(spec_of(objective=objective), TINY), KEYED.normal(*TINY.shape).double()
    sigma = torch.logspace(-2, 1.8, 6, dtype=torch.float64)
    x, scales = x0 + spread(sigma) * KEYED.normal(*TINY.shape, stream=1), net.objective.scales(sigma)
    target = (x0 - spread(scales.c_skip) * x) / spread(scales.c_out)
    net.network = Constant(target)

    assert torch.allclose(net(x, sigma, torch.zeros(6)), x0, atol=1e-4)


class Constant(nn.Module):
    """A network with one answer."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *_: Tensor) -> Tensor:
        return self.answer


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_every_weight_gets_a_gradient(network: str) -> None:
    spec = spec_of(network=network, label_dropout=0.5)
    net = trained(spec).requires_grad_()

    loss(spec, net.train(), BATCH, KEYED).loss.backward()

    assert [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@pytest.mark.parametrize("network", ["unet", "dit"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 17, 30)])
def test_every_resolution_goes_in_and_comes_out(network: str, shape: tuple[int, ...]) -> None:
    net = trained(spec_of(network=network), DataInfo(shape=shape))
    x = KEYED.normal(*shape).double()

    assert net(x, torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.long)).shape == (6, *shape)


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_a_network_uses_the_class_and_the_noise_level(network: str) -> None:
    net, x = trained(spec_of(network=network)), KEYED.normal(*TINY.shape).double()
    ones, zeros = torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    outputs = [net.raw(x, ones, zeros), net.raw(x, ones, zeros + 3), net.raw(x, 2 * ones, zeros)]

    assert not any(torch.allclose(outputs[0], other, atol=1e-3) for other in outputs[1:])


def test_dropout_is_keyed_by_the_noise_and_keeps_the_mean() -> None:
    dropout, ones = Dropout(0.25), torch.ones(6, 4000)

    with dropout.drawing(KEYED):
        first, second = dropout(ones), dropout(ones)
    with dropout.drawing(KEYED):
        again = dropout(ones)

    assert torch.equal(first, again) and not torch.equal(first, second) and torch.equal(dropout(ones), ones)
    assert first.mean().item() == pytest.approx(1, abs=0.02)
    assert first.unique().tolist() == pytest.approx([0, 4 / 3])


def test_dropout_acts_in_training_only() -> None:
    spec = spec_of(dropout=0.5)
    net = trained(spec)

    losses = [loss(spec, net.train(mode), BATCH, KEYED).loss.item() for mode in (False, True)]

    assert losses[0] == loss(spec_of(), net.eval(), BATCH, KEYED).loss.item()
    assert losses[0] != losses[1]


# Samplers ----------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """The exact denoiser of a mixture of two round Gaussians in the plane: the posterior mean of x0."""

    weights, means, width = torch.tensor([0.3, 0.7]), torch.tensor([[-0.6, 0.0], [0.5, 0.4]]), 0.1
    num_classes = 0
    encode, decode = staticmethod(centred), staticmethod(to_bytes)

    def forward(self, noisy: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        x, variance = noisy.flatten(1)[:, None], (self.width**2 + sigma**2)[:, None]
        means = self.means.double()
        logits = self.weights.double().log() - (x - means).square().sum(-1) / (2 * variance)
        shrink = (self.width**2 / variance)[..., None]
        posterior = means + shrink * (x - means)
        return (logits.softmax(1)[..., None] * posterior).sum(1).view_as(noisy)


PLANE = DataInfo(shape=(2, 1, 1))


def drawn(net: nn.Module, num: int, data: DataInfo = PLANE, **options: Any) -> Tensor:
    """Samples of one request, ``(num, ...)``."""
    request = Generate(task="generate", model="m", **options)
    sampler = FAMILY.tasks["generate"](spec_of(), data)
    sampler.num_rows = sampler.num_steps(request)
    keys = [Noise.of_step(Domain.SAMPLING, 0, step, range(num), CPU) for step in range(sampler.num_rows)]
    state = sampler.start([Draw(request=request, index=index) for index in range(num)], keys[0])
    for noise in keys:
        state = state | sampler.step(net, state, noise)
    return state["x"].flatten(1)


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "heun", "steps": 60},
        {"solver": "dpmpp_2m", "steps": 80},
        {"solver": "euler", "steps": 150},
        {"solver": "ddim", "steps": 150, "eta": 0.5},
        {"solver": "ddpm", "steps": 250},
    ],
    ids=lambda options: options["solver"],
)
def test_samples_have_the_distribution_of_the_data(options: dict[str, Any]) -> None:
    num = 4000
    x = drawn(Mixture(), num, **options)

    is_right = (x - Mixture.means[1]).norm(dim=1) < (x - Mixture.means[0]).norm(dim=1)
    assert is_right.double().mean().item() == pytest.approx(0.7, abs=4 * (0.21 / num) ** 0.5)
    for mean, component in zip(Mixture.means, (x[~is_right], x[is_right]), strict=True):
        error = (component.mean(0) - mean).abs().max().item()
        assert error < 4 * Mixture.width / len(component) ** 0.5
        assert component.std(0).tolist() == pytest.approx([Mixture.width] * 2, rel=0.06)


def slope(solver: str, steps: Sequence[int]) -> float:
    """Of the error's logarithm over that of the step's length, by least squares."""
    exact = drawn(Mixture(), 64, solver="heun", steps=1000)
    errors = [(drawn(Mixture(), 64, solver=solver, steps=num) - exact).square().mean().sqrt() for num in steps]
    h = -torch.tensor(steps, dtype=torch.float64).log()
    y = torch.stack(errors).log()
    return (((h - h.mean()) * (y - y.mean())).sum() / (h - h.mean()).square().sum()).item()


@pytest.mark.parametrize(
    ("solver", "order", "fewest"), [("euler", 1, 40), ("ddim", 1, 40), ("heun", 2, 40), ("dpmpp_2m", 2, 100)]
)
def test_the_error_falls_with_the_order_of_the_solver(solver: str, order: int, fewest: int) -> None:
    steps = [fewest, fewest * 3 // 2, fewest * 2, fewest * 3, fewest * 4]

    assert slope(solver, steps) == pytest.approx(order, rel=0.15)


def requests() -> list[Draw[Any]]:
    """Strangers: other solvers, steps, seeds, classes and guidance."""
    options: list[dict[str, Any]] = [
        {"solver": "heun", "steps": 4, "guidance_scale": 3.0, "guidance_interval": (0.1, 5.0)},
        {"solver": "euler", "steps": 1, "seed": 9},
        {"solver": "ddim", "steps": 6, "eta": 0.7, "labels": [2]},
        {"solver": "ddpm", "steps": 5, "guidance_scale": 2.0},
        {"solver": "dpmpp_2m", "steps": 7, "seed": 4, "labels": [1, 0]},
        {"solver": "heun", "steps": 2},
        {"solver": "euler", "steps": 9, "guidance_scale": 0.0},
    ]
    asked = [Generate(task="generate", model="m", **fields) for fields in options]
    return [Draw(request=request, index=index) for index in (0, 1) for request in asked]


class Exposed:
    """A sampler whose output is the last state in full, before rounding to bytes could hide a bit."""

    def __init__(self, inner: Any) -> None:
        self.num_steps, self.start, self.step = inner.num_steps, inner.start, inner.step

    def finish(self, net: nn.Module, state: dict[str, Tensor]) -> Tensor:
        return state["x"]


def tile_of(net: Denoiser, spec: DiffusionSpec, draw: Draw[Any], data: DataInfo = TINY) -> Tile[Any]:
    return Tile(net, Exposed(FAMILY.tasks[draw.request.task](spec, data)), draw, CPU)


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_a_sample_alone_equals_itself_among_strangers(network: str) -> None:
    spec = spec_of(network=network)
    net, draws = trained(spec), requests()

    with exact(1):
        tile = tile_of(net, spec, draws[1])
        together = {id(draw): x for draw, x in sample(tile, draws)}
        for draw in draws[:7]:
            [(_, alone)] = sample(tile_of(net, spec, draw), [draw])
            assert torch.equal(together[id(draw)], alone)
    assert tile.width == 8


@pytest.mark.parametrize("data", [TINY, DataInfo(shape=(1, 28, 28)), DataInfo(shape=(3, 32, 32))], ids=str)
@pytest.mark.parametrize("network", ["unet", "dit"])
def test_usual_images_share_a_wide_tile(network: str, data: DataInfo) -> None:
    spec = spec_of(network=network)

    with exact(1):
        assert tile_of(trained(spec, data), spec, requests()[3], data).width == 8


def test_guidance_is_the_extrapolation_from_the_unlabelled_estimate() -> None:
    spec = spec_of()
    net, sampler = trained(spec), FAMILY.tasks["generate"](spec, TINY)
    request = Generate(task="generate", model="m", guidance_scale=2.5, guidance_interval=(0.5, 2.0), labels=[1])
    state = sampler.start([Draw(request=request, index=0)] * 3, Noise.of_step(Domain.SAMPLING, 0, 0, range(3), CPU))
    sigma = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)

    estimate = sampler.estimate(net, state, sigma)

    known, unknown = (net(state["x"], sigma, torch.full((3,), label)) for label in (1, 3))
    assert torch.equal(estimate[[0, 2]], known[[0, 2]])
    assert torch.allclose(estimate[1], (2.5 * known - 1.5 * unknown)[1])


class Counting(nn.Module):
    """A network that counts its evaluations."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__()
        self.inner, self.num_evaluations, self.num_classes = inner, 0, inner.num_classes

    def forward(self, *inputs: Tensor) -> Tensor:
        self.num_evaluations += 1
        return self.inner(*inputs)

    def decode(self, x: Tensor) -> Tensor:
        return self.inner.decode(x)


@pytest.mark.parametrize(
    ("num_guided", "num_plain", "evaluations"),
    [(4, 0, 1), (3, 2, 1), (1, 6, 1), (5, 0, 2), (1, 7, 2), (0, 8, 1)],
)
def test_guided_samples_are_evaluated_once_where_the_tile_has_room(
    num_guided: int, num_plain: int, evaluations: int
) -> None:
    spec, asked = spec_of(), {"task": "generate", "model": "m", "solver": "euler", "steps": 5}
    net = Counting(trained(spec))
    requests = [
        Generate.model_validate(asked | {"seed": seed, "guidance_scale": 2.5 if seed < num_guided else 1.0})
        for seed in range(num_guided + num_plain)
    ]
    draws = [Draw(request=request, index=0) for request in requests]

    with exact(1):
        tile = tile_of(net, spec, draws[0])
        tried = net.num_evaluations
        together = {draw.request.seed: image for draw, image in sample(tile, draws)}
        assert (tile.width, net.num_evaluations - tried) == (8, 5 * evaluations)
        for draw in draws:
            [(_, alone)] = sample(tile_of(net, spec, draw), [draw])
            assert torch.equal(together[draw.request.seed], alone)


def test_a_guided_sample_that_has_left_costs_its_neighbours_nothing() -> None:
    spec, asked = spec_of(), {"task": "generate", "model": "m", "solver": "euler"}
    net = Counting(trained(spec))
    wishes = [{"steps": 2, "guidance_scale": 2.0}] * 7 + [{"steps": 6}]
    draws = [Draw(request=Generate.model_validate(asked | wish), index=place) for place, wish in enumerate(wishes)]
    tile = tile_of(net, spec, draws[0])
    before = net.num_evaluations

    list(sample(tile, draws))

    assert net.num_evaluations - before == 2 * 2 + 4


def test_the_noise_of_the_first_step_is_not_that_of_the_start() -> None:
    request = Generate(task="generate", model="m", solver="ddpm", steps=9)
    sampler, noise = FAMILY.tasks["generate"](spec_of(), TINY), Noise.of_step(Domain.SAMPLING, 0, 0, range(20), CPU)
    state = sampler.start([Draw(request=request, index=index) for index in range(20)], noise)

    after = sampler.step(Constant(torch.zeros_like(state["x"])), state, noise)["x"]

    kept = state["table"][0, 0, 1]
    fresh = after - kept * state["x"]
    correlation = torch.corrcoef(torch.stack((fresh.flatten(), state["x"].flatten())))[0, 1]
    assert fresh.std() > 1
    assert abs(correlation.item()) < 0.15


def test_classes_come_in_turn_unless_some_are_asked_for() -> None:
    sampler, noise = FAMILY.tasks["generate"](spec_of(), TINY), Noise.of_step(Domain.SAMPLING, 0, 0, range(5), CPU)

    def labels(**options: Any) -> list[int]:
        request = Generate(task="generate", model="m", **options)
        return sampler.start([Draw(request=request, index=index) for index in range(5)], noise)["label"].tolist()

    assert labels() == [0, 1, 2, 0, 1]
    assert labels(labels=[2, 0]) == [2, 0, 2, 0, 2]


def test_a_path_runs_between_two_samples_of_its_seed_and_keeps_one_class() -> None:
    noise = Noise.of_step(Domain.SAMPLING, 0, 0, range(10), CPU)
    path, plain = (
        FAMILY.tasks[request.task](spec_of(), TINY).start([Draw(request=request, index=i) for i in range(10)], noise)
        for request in (Interpolate(task="interpolate", model="m", num_points=5), Generate(task="generate", model="m"))
    )

    assert torch.allclose(path["x"][[0, 4, 5, 9]], plain["x"][:4], rtol=1e-5, atol=1e-4)
    assert path["label"].tolist() == [0] * 5 + [1] * 5


def test_an_image_survives_the_way_to_noise_and_back() -> None:
    """With the exact denoiser, images of the data come back; what they were encoded to is normal."""
    request = Reconstruct(task="reconstruct", model="m", dataset=DATASET)
    sampler = FAMILY.tasks["reconstruct"](spec_of(), PLANE)
    images = ((torch.tensor([[[[-0.55]], [[0.1]]], [[[0.45]], [[0.3]]]]) + 1) * 127.5).round().to(torch.uint8)
    draws = [Draw(request=request, index=index, inputs={"image": image}) for index, image in enumerate(images)]
    state = sampler.start(draws, Noise.of_step(Domain.SAMPLING, 0, 0, range(2), CPU))

    farthest = 0.0
    for step in range(sampler.num_steps(request)):
        state = state | sampler.step(Mixture(), state, Noise.of_step(Domain.SAMPLING, 0, step, range(2), CPU))
        farthest = max(farthest, state["x"].abs().max().item())

    assert (sampler.finish(Mixture(), state).int() - images.int()).abs().max() <= 1
    assert farthest > 20


def test_the_noise_that_an_image_is_encoded_to_leads_back_to_it() -> None:
    request = Encode(task="encode", model="m", dataset=DATASET)
    sampler = FAMILY.tasks["encode"](spec_of(), PLANE)
    image = ((torch.tensor([[[-0.55]], [[0.1]]]) + 1) * 127.5).round().to(torch.uint8)
    draws = [Draw(request=request, index=0, inputs={"image": image})]
    state = sampler.start(draws, Noise.of_step(Domain.SAMPLING, 0, 0, range(1), CPU))
    for step in range(sampler.num_steps(request)):
        state = state | sampler.step(Mixture(), state, Noise.of_step(Domain.SAMPLING, 0, step, range(1), CPU))
    encoded = sampler.finish(Mixture(), state)

    back = FAMILY.tasks["generate"](spec_of(), PLANE)
    generate = Generate(task="generate", model="m", num_samples=1, solver="heun", steps=50)
    noise = Noise.of_step(Domain.SAMPLING, 0, 0, range(1), CPU)
    state = back.start([Draw(request=generate, index=0)], noise)
    state["x"] = encoded.double() * Edm.sigma_max
    for step in range(back.num_steps(generate)):
        state = state | back.step(Mixture(), state, Noise.of_step(Domain.SAMPLING, 0, step, range(1), CPU))

    assert (encoded.dtype, encoded.shape) == (torch.float32, (1, 2, 1, 1))
    assert (back.finish(Mixture(), state).int() - image.int()).abs().max() <= 1


def test_samples_are_bytes_of_minus_one_to_one() -> None:
    state = {"x": torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]).view(6, 1, 1, 1).double()}

    finished = FAMILY.tasks["generate"](spec_of(), TINY).finish(build(spec_of(), TINY), state)

    assert finished.dtype == torch.uint8
    assert finished.flatten().tolist() == [0, 0, 128, 191, 255, 255]


# Spec --------------------------------------------------------------------------------------------

WITH_CLASSES = {"shape": [1, 28, 28], "num_classes": 10}


@pytest.mark.parametrize(
    ("field", "spec", "options"),
    [
        ("eta", {}, {"eta": 0.5, "solver": "heun"}),
        ("eta", {}, {"eta": 0.5}),
        ("guidance_scale", {"class_conditional": False}, {"guidance_scale": 2.0}),
        ("guidance_scale", {"label_dropout": 0}, {"guidance_scale": 2.0}),
        ("guidance_interval", {}, {"guidance_interval": (0.1, 2.0)}),
        ("labels", {}, {"labels": [10]}),
        ("temperature", {}, {"temperature": 0.5}),
    ],
)
def test_what_a_model_cannot_do_is_refused(field: str, spec: dict[str, Any], options: dict[str, Any]) -> None:
    request = Generate(task="generate", model="m", **options)

    with pytest.raises(PydanticCustomError) as refused:
        spec_of(**spec).check_task(request, WITH_CLASSES)

    assert refused.value.context["field"] == field


def test_what_a_model_can_do_is_accepted() -> None:
    options = {"solver": "ddim", "eta": 1.0, "guidance_scale": 2.0, "guidance_interval": (0.1, 2.0), "labels": [9]}

    spec_of().check_task(Generate(task="generate", model="m", **options), WITH_CLASSES)


def test_every_task_of_the_spec_has_a_sampler() -> None:
    assert FAMILY.tasks.keys() == DiffusionSpec.tasks.keys()


def test_the_noise_levels_of_ddpm_are_those_of_its_betas() -> None:
    signal = torch.exp(-2 * ddpm_log_sigmas()[[0, 999]])

    assert signal.tolist() == pytest.approx([9999, 4.0358e-5], rel=1e-3)

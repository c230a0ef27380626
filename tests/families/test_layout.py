"""Networks laid out as NHWC give what they give as NCHW, and are NHWC everywhere, where each change costs a copy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.specs import GanSpec, VaeSpec
from worker.engine.training import Trainer, build
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.families.nets.doubling import DoublingConv
from worker.families.nets.layout import flat, is_nhwc, laid_out_as
from worker.kernels.noise import Domain, Noise

CPU = torch.device("cpu")
NAMED = {"dataset": "ds_" + "0" * 32, "model": "layout", "base_channels": 16, "batch_size": 4}
SPECS = {
    "vae": VaeSpec.model_validate({"family": "vae", "network": "conv", **NAMED}),
    "gan": GanSpec.model_validate({"family": "gan", "network": "dcgan", **NAMED}),
}
SHAPES = [(1, 28, 28), (3, 30, 18)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return Noise.of_step(Domain.TRAINING, seed, 0, range(shape[0]), CPU).normal(*shape[1:])


def trainer_of(family: str, shape: tuple[int, ...], **fields: Any) -> Trainer[Any, Any]:
    spec = SPECS[family].model_copy(update=fields)
    trainer: Trainer[Any, Any] = Trainer(FAMILIES[family], spec, DataInfo(shape=shape), CPU)
    with torch.no_grad():
        for place, weight in enumerate(trainer.net.parameters()):
            weight.add_(0.05 * drawn(1, *weight.shape, seed=place)[0])
    return trainer


def gradients(trainer: Trainer[Any, Any], part: str) -> list[Tensor]:
    batch = trainer.place({"image": (60 * drawn(4, *trainer.data.shape) + 128).clamp(0, 255).to(torch.uint8)})
    noise = Noise.of_step(Domain.TRAINING, 0, 0, range(4), CPU)
    loss = trainer.family.losses[part](trainer.spec, trainer.net, batch, noise).loss
    found = torch.autograd.grad(loss, list(trainer.parts[part].parameters.values()), allow_unused=True)
    return [loss.detach(), *(one for one in found if one is not None)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("family", "part"), [("vae", "vae"), ("gan", "discriminator"), ("gan", "generator")])
def test_the_layout_changes_no_loss_and_no_gradient(family: str, part: str, shape: tuple[int, ...]):
    part = next(iter(FAMILIES[family].losses)) if family == "vae" else part
    found, expected = (
        gradients(trainer_of(family, shape, precision="fp32", channels_last=is_last), part) for is_last in (True, False)
    )

    # Of the greatest: a bias before a batch norm has no slope but what rounding leaves.
    greatest = max(want.abs().max().item() for want in expected[1:])
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-4 * greatest)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", SPECS)
def test_a_network_that_is_nhwc_is_so_from_its_first_map_to_its_last(family: str, shape: tuple[int, ...]):
    trainer = trainer_of(family, shape, channels_last=True)
    seen: list[tuple[str, bool]] = []

    def look(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            seen.append((name, is_nhwc(output)))

        return note

    for name, module in trainer.net.named_modules():
        if isinstance(module, nn.Conv2d | nn.LeakyReLU | nn.ReLU) or type(module).__name__ == "NormSilu":
            module.register_forward_hook(look(name))
    for part in trainer.parts:
        gradients(trainer, part)

    assert len(seen) > 10
    assert [name for name, is_so in seen if not is_so] == []


def test_a_map_takes_the_layout_of_the_network():
    weight, x = torch.empty(8, 4, 3, 3), drawn(2, 4, 5, 7)

    placed = laid_out_as(weight.to(memory_format=torch.channels_last), x)

    assert torch.equal(placed, x) and is_nhwc(placed)
    assert laid_out_as(weight, x) is x


def test_a_gradient_comes_back_in_the_layout_of_what_was_flattened():
    x = drawn(2, 4, 5, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    slopes: list[Tensor] = []
    before = 2 * x
    before.register_hook(slopes.append)

    y = flat(2 * before)
    y.backward(drawn(*y.shape))

    assert torch.equal(y, (4 * x).flatten(1))
    assert is_nhwc(slopes[0]) and torch.equal(slopes[0].flatten(1), 2 * drawn(*y.shape))


def test_a_doubling_convolution_is_a_transposed_convolution():
    ours, torchs = DoublingConv(6, 5).double(), nn.ConvTranspose2d(6, 5, 4, stride=2, padding=1).double()
    torchs.load_state_dict(ours.state_dict())
    x = drawn(2, 6, 3, 4).double()

    found, expected = ours(x), torchs(x)

    torch.testing.assert_close(found, expected)
    upstream = drawn(*found.shape, seed=1).double()
    for got, want in zip(
        torch.autograd.grad(found, list(ours.parameters()), upstream),
        torch.autograd.grad(expected, list(torchs.parameters()), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", SPECS)
def test_the_names_of_weights_are_those_of_models_that_were_published_before(family: str):
    net = build(FAMILIES[family], SPECS[family], DataInfo(shape=(1, 28, 28)))
    expected = {
        "vae": {"encoder.map.body.1.norm1.0.weight", "decoder.image.body.2.bias", "encoder.map.body.4.0.bias"},
        "gan": {"generator.body.body.2.bias", "discriminator.body.3.gain_C", "discriminator.head.psi.weight"},
    }

    assert expected[family] <= set(net.state_dict())

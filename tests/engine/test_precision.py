"""In what precision and layout networks train and sample where nobody says so."""

from typing import Any

import pytest
import torch
from torch import Tensor

from shared.specs import DiffusionSpec
from shared.specs.tasks import Generate
from tests.engine.conftest import CPU, small_spec
from worker.engine.numerics import Numerics, for_sampling, multiplies_bf16
from worker.engine.sampling import Tile, sample
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo, Draw
from worker.kernels import native
from worker.kernels.noise import Domain, Noise

DATA = DataInfo(shape=(3, 16, 16))
DIFFUSION = FAMILIES["diffusion"]
SPEC = DiffusionSpec(family="diffusion", dataset="ds_" + "0" * 32, model="m", network="unet", preset="xs")
BF16 = Numerics(precision="bf16", channels_last=True, num_threads=1)


@pytest.fixture(scope="module", params=["unet", "dit"])
def net(request: pytest.FixtureRequest) -> Any:
    return disturbed(SPEC.model_copy(update={"network": request.param}))


def disturbed(spec: DiffusionSpec) -> Any:
    """With weights of which none is zero."""
    made = build(DIFFUSION, spec, DATA).eval()
    for number, weight in enumerate(made.parameters()):
        drawn = Noise.of_step(Domain.TRAINING, 1, number, range(1), CPU).normal(*weight.shape)[0]
        weight.data.add_(0.03 * drawn)
    return made


def raw(net: Any) -> Tensor:
    x = Noise.of_step(Domain.TRAINING, 2, 0, range(4), CPU).normal(*DATA.shape)
    with torch.no_grad():
        return net.raw(x, torch.linspace(0.1, 5, 4), torch.zeros(4, dtype=torch.int64))


def drawn(net: Any, indices: list[int]) -> dict[int, Tensor]:
    request = Generate(task="generate", model="m@1", num_samples=8, steps=3, seed=5)
    draws = [Draw(request=request, index=index) for index in indices]
    tile = Tile(net, DIFFUSION.tasks["generate"](SPEC, DATA), draws[0], CPU, width=4)
    return {draw.index: image for draw, image in sample(tile, draws)}


def test_diffusion_is_laid_out_as_its_kernels_want_it() -> None:
    assert Numerics.choose(SPEC, CPU).channels_last == native.is_available()
    assert not Numerics.choose(small_spec(network="mlp"), CPU).channels_last


def test_precision_is_what_the_device_multiplies() -> None:
    assert Numerics.choose(SPEC, CPU).precision == ("bf16" if multiplies_bf16(CPU) else "fp32")


def test_a_network_prepared_in_bf16_gives_float32_as_before_but_for_rounding(net: Any) -> None:
    prepared = for_sampling(net, BF16)

    before, after = raw(net), raw(prepared)
    assert after.dtype == torch.float32
    assert 0 < (after - before).norm() / before.norm() < 0.02


def test_preparing_a_network_leaves_it_as_it_was(net: Any) -> None:
    prepared = for_sampling(net, BF16)

    assert {weight.dtype for weight in net.parameters()} == {torch.float32}
    assert {weight.dtype for weight in prepared.network.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in prepared.parameters())
    for buffer, prepared_buffer in zip(net.buffers(), prepared.buffers(), strict=True):
        assert torch.equal(buffer, prepared_buffer) and buffer.dtype == prepared_buffer.dtype


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_in_bf16_a_network_still_knows_a_thousand_times_apart(network: str) -> None:
    """In bfloat16 the waves' frequencies would be off by whole turns at late times."""
    embed = disturbed(SPEC.model_copy(update={"network": network, "objective": "eps"})).network.embed
    prepared = for_sampling(embed.__self__, BF16).embed
    times, labels = torch.arange(900, 1000).float(), torch.zeros(100, dtype=torch.int64)

    with torch.no_grad():
        before, after = embed(times, labels), prepared(times, labels).float()
    assert 0 < (after - before).norm() / before.norm() < 0.01


def test_a_family_whose_networks_know_no_other_precision_is_drawn_in_fp32() -> None:
    asked = {spec.family: Numerics.of_sampling(spec, "bf16", CPU) for spec in (SPEC, small_spec())}

    assert {family: numerics.precision for family, numerics in asked.items()} == {"diffusion": "bf16", "vae": "fp32"}
    assert asked["vae"] == Numerics.of_sampling(small_spec(), "fp32", CPU)


def test_in_bf16_a_sample_is_the_same_alone_and_among_others(net: Any) -> None:
    prepared = for_sampling(net, BF16)

    alone, among = drawn(prepared, [3]), drawn(prepared, [6, 0, 3, 1, 7])
    assert torch.equal(alone[3], among[3])

"""A network whose calls are repeated draws what it would have drawn, whoever else of its architecture does."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.specs.diffusion import DiffusionSpec
from shared.specs.tasks import Generate
from tests.engine.conftest import CPU
from tests.engine.tape import TapeRecorder
from worker.engine.captured_calls import Called, SharedCalls, architecture_of, called
from worker.engine.numerics import Numerics, for_sampling
from worker.engine.sampling import Line, Tile, sample
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo, Draw
from worker.kernels import native

DATA = DataInfo(shape=(1, 8, 8), num_classes=2)
DIFFUSION = FAMILIES["diffusion"]
FP32 = Numerics(precision="fp32", channels_last=False, num_threads=1)


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape does not hear what our C++ kernels do; a GPU has none of them."""
    monkeypatch.setattr(native, "is_available", lambda: False)


def spec_of(**fields: Any) -> DiffusionSpec:
    common = {"family": "diffusion", "dataset": "ds_" + "0" * 32, "model": "m", "network": "dit", "preset": "xs"}
    return DiffusionSpec.model_validate(common | fields)


def net_of(seed: int = 0, **fields: Any) -> Any:
    """A network of this seed that does not give zeros."""
    net = for_sampling(build(DIFFUSION, spec_of(seed=seed, **fields), DATA), FP32)
    for number, weight in enumerate(net.parameters()):
        weight.add_(0.05 * torch.arange(weight.numel()).add(number + seed).sin().view(weight.shape))
    return net


def tile_of(net: Any, **asked: Any) -> Tile[Any]:
    sampler = DIFFUSION.tasks["generate"](spec_of(), DATA)
    return Tile(net, sampler, draws_of(**asked)[0], CPU, width=4)


def draws_of(num: int = 5, **asked: Any) -> list[Draw[Any]]:
    request = Generate(task="generate", model="m@1", num_samples=num, **{"steps": 4, "seed": 3} | asked)
    return [Draw(request=request, index=index) for index in range(num)]


def drawn(tile: Tile[Any], **asked: Any) -> Mapping[int, Tensor]:
    return {draw.index: image for draw, image in sample(tile, draws_of(**asked))}


def same(one: Mapping[int, Tensor], other: Mapping[int, Tensor]) -> bool:
    return len(one) > 0 and all(torch.equal(one[index], other[index]) for index in one.keys() | other.keys())


@pytest.mark.parametrize("asked", [{}, {"guidance_scale": 2.0}, {"solver": "ddpm", "steps": 6}])
def test_repeated_calls_draw_the_bytes_of_plain_ones(asked: dict[str, Any]) -> None:
    net, recorder = net_of(), TapeRecorder()

    repeated = drawn(tile_of(Called(net, SharedCalls(net, recorder)), **asked), **asked)

    assert recorder.num_played > 4
    assert same(repeated, drawn(tile_of(net, **asked), **asked))


def test_networks_of_one_architecture_share_what_was_recorded_and_keep_their_weights() -> None:
    first, second = net_of(seed=1), net_of(seed=2)
    shared = SharedCalls(first, TapeRecorder())
    lines = [Line(tile_of(Called(net, shared))) for net in (first, second)]
    for line in lines:
        line.add(draws_of())

    made: list[dict[int, Tensor | None]] = [{}, {}]
    while not all(line.is_empty for line in lines):  # by turns, as a service does
        for line, images in zip(lines, made, strict=True):
            images.update({draw.index: image for draw, image in line.step()})

    assert shared.repeats.num_recorded == 1
    assert [same(one, drawn(tile_of(net))) for one, net in zip(made, (first, second), strict=True)] == [True, True]
    assert not same(*made)


def test_only_networks_that_do_the_same_with_their_weights_are_of_one_architecture() -> None:
    here = architecture_of(net_of(seed=1))

    assert architecture_of(net_of(seed=2, steps=7)) == here
    for other in ({"objective": "flow"}, {"sigma_data": 0.7}, {"objective": "eps"}, {"patch_size": 2}):
        assert architecture_of(net_of(**other)) != here


def test_nobody_shares_with_a_network_of_which_not_all_can_be_told() -> None:
    net = net_of()
    net.trick = lambda x: x

    assert architecture_of(net) != architecture_of(net)


def test_what_is_differentiated_or_cast_is_computed_plainly() -> None:
    net = net_of()
    repeated, recorder = Called(net, shared := SharedCalls(net, TapeRecorder())), TapeRecorder()
    given = torch.zeros(2, *DATA.shape, dtype=torch.float64), torch.ones(2, dtype=torch.float64), torch.zeros(2).long()

    for _ in range(4):
        with torch.enable_grad():
            repeated(*given)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            repeated(*given)

    assert (shared.repeats.num_recorded, recorder.num_played) == (0, 0)


def test_memory_that_runs_out_beside_what_was_recorded_leaves_the_tile_as_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    net = net_of()
    repeated = Called(net, SharedCalls(net, TapeRecorder()))
    tile = tile_of(repeated)
    drawn(tile)
    usual, fails = tile.sampler.step, [True]

    def step(*about: Any) -> Any:
        if fails:
            fails.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(*about)

    monkeypatch.setattr(tile.sampler, "step", step)

    assert same(drawn(tile), drawn(tile_of(net)))
    assert (tile.width, repeated.trouble) == (4, "memory ran out beside what was recorded")


@pytest.mark.parametrize(
    ("family", "device", "trouble"),
    [("diffusion", CPU, "no GPU"), ("gan", torch.device("cuda"), "parts of the network")],
)
def test_who_asks_for_what_cannot_be_is_told_why(family: str, device: torch.device, trouble: str) -> None:
    fields = {"family": family, "dataset": "ds_" + "0" * 32, "model": "m"}
    net = build(FAMILIES[family], FAMILIES[family].spec.model_validate(fields), DATA)

    assert trouble in str(called(net, device).trouble)

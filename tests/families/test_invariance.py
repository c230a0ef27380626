"""Whatever the family, a sample has the same bits alone and among strangers of other seeds, steps and guidance, in
whatever order they come."""

import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic_core import PydanticCustomError
from safetensors.torch import load_file
from torch import nn

from shared.specs import FAMILIES as SPECS
from shared.specs.tasks import Generate
from shared.specs.training import TrainSpec
from tests.families.company import first_of
from tests.jobs.conftest import SHAPE
from tests.jobs.variants import variants
from worker.engine.numerics import Numerics, exact, for_sampling
from worker.engine.sampling import SEED, Line, Tile
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo, Draw, Origin, Sampler
from worker.kernels.noise import Domain, Noise

CPU = torch.device("cpu")
DATA = DataInfo(shape=tuple(SHAPE), num_classes=4)
ASKED: dict[str, Any] = {"task": "generate", "model": "m@1", "seed": 11}
GUIDED: dict[str, Any] = {"labels": [1], "guidance_scale": 2.5}
WIDTH = 8
"""Slots of a tile on a CPU."""
NARROW = {"ladder"}
"""Networks that draw one after another there."""


def drawing() -> Iterator[Any]:
    """Every choice of every family whose models draw by themselves, and are built on no other."""
    for name, fields in variants():
        kind = SPECS.get(fields["family"])
        if kind is None or not name.endswith("-fp32") or "generate" not in FAMILIES[fields["family"]].tasks:
            continue
        spec = kind.model_validate(fields)
        if not any(getattr(spec, field) for field in spec.built_on):
            yield pytest.param(spec, id=name.removesuffix("-fp32"))


class Exposed:
    """A sampler whose output is the last state in full, before rounding to bytes could hide a bit."""

    def __init__(self, inner: Sampler) -> None:
        self.num_steps, self.start, self.step = inner.num_steps, inner.start, inner.step

    def finish(self, net: Any, state: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensor.double().reshape(len(tensor), -1) for _, tensor in sorted(state.items())], 1)


def known(spec: TrainSpec) -> DataInfo:
    """What the network has to know, with the default model of the family that it begins with."""
    if not type(spec).model_fields["init_from"].is_required():
        return DATA
    begun = SPECS["diffusion"].model_validate({"family": "diffusion", "dataset": spec.dataset, "model": "m"})
    origin = Origin(family="diffusion", spec=begun.model_dump(mode="json"), data=DATA)
    return replace(DATA, models={"init_from": origin})


def network(spec: TrainSpec) -> nn.Module:
    """With weights of which none is zero, as first weights often are on purpose."""
    net = build(FAMILIES[spec.model_dump()["family"]], spec, known(spec)).eval().requires_grad_(requires_grad=False)
    for place, parameter in enumerate(net.parameters()):
        noise = Noise.of_step(Domain.TRAINING, 3, place, range(1), CPU)
        parameter.add_(noise.normal(*parameter.shape)[0], alpha=0.02)
    return net


def requests(spec: TrainSpec, *, num_strangers: int, wishes: Mapping[str, Any] = {}) -> list[Generate]:
    """One to look at, which asks for ``wishes``, and strangers who ask for other things, as far as it is understood."""
    chance = random.Random(5)
    asked = [_as_understood(spec, {"seed": ASKED["seed"], "steps": 4, **wishes})]
    for seed in range(num_strangers):
        others: dict[str, Any] = {
            "seed": seed,
            "temperature": chance.choice([0.5, 1.0]),
            "labels": [chance.randrange(4)],
        }
        others |= {"steps": chance.randint(1, 6), "guidance_scale": chance.choice([1.0, 2.5])}
        others |= {"solver": chance.choice(["euler", "heun", "ddim", "ddpm", "dpmpp_2m"]), "eta": 0.0}
        asked.append(_as_understood(spec, others))
    return asked


def _as_understood(spec: TrainSpec, wishes: dict[str, Any]) -> Generate:
    understood = spec.tasks["generate"] | {"seed"}
    request = Generate.model_validate(ASKED | {name: wish for name, wish in wishes.items() if name in understood})
    try:
        spec.check_task(request, known(spec).as_json())
    except PydanticCustomError:
        return Generate.model_validate(ASKED | {"seed": wishes["seed"]})
    return request


def drawn(
    spec: TrainSpec, net: nn.Module, asked: list[Generate], *, late: int = 0, is_last: bool = False
) -> torch.Tensor:
    """The sample of the first request; who comes when is told by ``first_of``."""
    sampler = Exposed(FAMILIES[spec.model_dump()["family"]].tasks["generate"](spec, known(spec)))
    draws = [Draw[Any](request=request, index=3, owner=place) for place, request in enumerate(asked)]
    tile = Tile(net, sampler, draws[-1], CPU)
    assert tile.width == (1 if spec.model_dump().get("network") in NARROW else WIDTH)
    return first_of(tile, draws, late=late, is_last=is_last)


@pytest.mark.parametrize("spec", [*drawing()])
def test_a_sample_has_the_bits_it_has_alone(spec: TrainSpec) -> None:
    net, asked = network(spec), requests(spec, num_strangers=6)

    alone = drawn(spec, net, asked[:1])

    assert torch.equal(drawn(spec, net, asked[:2]), alone)
    assert torch.equal(drawn(spec, net, asked[:2], is_last=True), alone)
    assert torch.equal(drawn(spec, net, asked, late=3), alone)
    assert torch.equal(drawn(spec, net, asked, late=3, is_last=True), alone)


@pytest.mark.parametrize("spec", [one for one in drawing() if one.values[0].computes_in_type_of_weights])
def test_in_bf16_a_sample_has_the_bits_it_has_alone(spec: TrainSpec) -> None:
    net = for_sampling(network(spec), Numerics.of_sampling(spec, "bf16", CPU))
    asked = requests(spec, num_strangers=6, wishes=GUIDED)

    alone = drawn(spec, net, asked[:1])

    assert torch.bfloat16 in {weight.dtype for weight in net.parameters()}
    assert torch.equal(drawn(spec, net, asked[:2], is_last=True), alone)
    assert torch.equal(drawn(spec, net, asked, late=2, is_last=True), alone)


def plain_specs() -> dict[str, TrainSpec]:
    """The plain choice of every family whose models draw by themselves."""
    plain: dict[str, TrainSpec] = {}
    for one in drawing():
        plain.setdefault(one.values[0].model_dump()["family"], one.values[0])
    return plain


@pytest.mark.parametrize("family", [family for family in SPECS if "generate" in FAMILIES[family].tasks])
def test_sixty_four_strangers_change_no_bit(family: str) -> None:
    spec = plain_specs()[family]
    net, asked = network(spec), requests(spec, num_strangers=63, wishes=GUIDED)

    alone = drawn(spec, net, asked[:1])

    assert torch.equal(drawn(spec, net, asked, late=20), alone)
    assert torch.equal(drawn(spec, net, asked, late=20, is_last=True), alone)


def test_another_process_draws_the_same_bits(tmp_path: Path) -> None:
    """One that was started afresh, with other strangers in another order and with one of theirs in the empty slots."""
    path = tmp_path / "drawn.safetensors"

    subprocess.run([sys.executable, "-m", "tests.families.elsewhere", path], check=True)

    there = load_file(path)
    with exact(1):
        here = {
            family: drawn(spec, network(spec), requests(spec, num_strangers=0))
            for family, spec in plain_specs().items()
        }
    assert there.keys() == here.keys()
    assert [family for family in here if not torch.equal(here[family], there[family])] == []


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_a_stranger_makes_of_no_number_stays_in_its_slot(value: float) -> None:
    spec = next(one.values[0] for one in drawing() if one.id == "diffusion")
    net, asked = network(spec), requests(spec, num_strangers=6)
    broken = Generate.model_validate(ASKED | {"seed": 99, "steps": 3, "labels": [2]})
    sampler = FAMILIES["diffusion"].tasks["generate"](spec, DATA)
    line: Line[Any] = Line(Tile(net, Spoiled(Exposed(sampler), value), Draw(request=asked[0], index=3), CPU))

    line.add([Draw(request=one, index=3, owner=place) for place, one in enumerate([*asked, broken])])
    done: dict[Any, torch.Tensor | None] = {}
    while not line.is_empty:
        done |= {draw.owner: sample for draw, sample in line.step()}

    assert done[len(asked)] is None
    sample = done[0]
    assert sample is not None
    assert torch.equal(sample, drawn(spec, net, asked[:1]))


class Spoiled:
    """A sampler of whose state one number is ``value`` after each step of one seed."""

    def __init__(self, inner: Any, value: float) -> None:
        self.num_steps, self.start, self.finish, self._step = inner.num_steps, inner.start, inner.finish, inner.step
        self._value = value

    def step(self, net: Any, state: dict[str, torch.Tensor], noise: Noise) -> dict[str, torch.Tensor]:
        after = self._step(net, state, noise)
        is_spoiled = (state[SEED] == 99).view(-1, *[1] * (after["x"].dim() - 1))
        corner = torch.zeros_like(after["x"], dtype=torch.bool)
        corner.view(len(corner), -1)[:, 0] = True
        return after | {"x": torch.where(is_spoiled & corner, self._value, after["x"])}

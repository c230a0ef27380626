"""Whatever the family and whatever it is asked, latents and pictures included, a sample has the same bits alone and
among strangers who ask the same task for other things. (``test_invariance.py`` has every choice of what draws by
itself.)"""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, get_args

import pytest
import torch
from pydantic_core import PydanticCustomError
from safetensors.torch import load_file
from torch import nn

from shared.specs import FAMILIES as SPECS
from shared.specs.tasks import OPTIONS, Request
from shared.specs.training import TrainSpec
from tests.families.company import first_of
from tests.families.test_invariance import CPU, Exposed
from tests.jobs.conftest import DATASET_ID
from tests.jobs.variants import variants
from worker.engine.numerics import exact
from worker.engine.sampling import Tile
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo, Draw, Origin
from worker.kernels.noise import Domain, Noise

DATA = DataInfo(shape=(3, 12, 12), num_classes=4)
KINDS: Final[dict[str, Any]] = {get_args(kind.model_fields["task"].annotation)[0]: kind for kind in get_args(Request)}
NEEDED: Final[dict[str, dict[str, Any]]] = {
    "inpaint": {"box": (2, 3, 9, 8)},
    "stylise": {"style": DATASET_ID},
    "match_style": {"style": DATASET_ID},
    "traverse": {"num_dimensions": 1},
}
"""What a task cannot do without."""
USUAL: Final = {"style": "stylise", "translation": "translate"}
"""What families do whose models draw nothing by themselves."""
ENCODING_STEPS: Final = 3
"""Instead of 50, each of two passes through the network."""


def origin_of(field: str, named: str, families: frozenset[str]) -> Origin:
    family = named.partition("@")[0]
    family = family if family in families else min(families)
    begun = SPECS[family].model_validate({"family": family, "dataset": DATASET_ID, "model": field})
    return Origin(family=family, spec=begun.model_dump(mode="json"), data=DATA)


def known(spec: TrainSpec) -> DataInfo:
    """What the network has to know, with the models that it begins with or is built on."""
    models = {field: origin_of(field, *about) for field, about in spec.references().items()}
    return DataInfo(shape=DATA.shape, num_classes=DATA.num_classes, models=models)


def specs() -> Iterator[tuple[str, TrainSpec]]:
    """The plain choice of every family, and each kind of model that one can be built on."""
    for name, fields in variants():
        kind = SPECS.get(fields["family"])
        if kind is None or not name.endswith("-fp32"):
            continue
        spec = kind.model_validate(fields)
        if name == f"{fields['family']}-fp32" or any(getattr(spec, field) for field in spec.built_on):
            yield name.removesuffix("-fp32"), spec


def cases() -> dict[str, tuple[TrainSpec, str]]:
    """Everything that a model of these can be asked."""
    asked = ((name, spec, task) for name, spec in specs() for task in sorted(spec.tasks))
    return {f"{name}-{task}": (spec, task) for name, spec, task in asked if request_of(spec, task, {}) is not None}


def request_of(spec: TrainSpec, task: str, wishes: dict[str, Any]) -> Any:
    """What asks for ``wishes`` as far as the model understands them; None if it cannot be asked the task."""
    kind, understood = KINDS[task], spec.tasks[task]
    meant = {
        name: wish
        for name, wish in wishes.items()
        if name in kind.model_fields and (name not in OPTIONS or name in understood)
    }
    inputs = {"dataset": DATASET_ID} if "dataset" in kind.model_fields else {}
    unguided = {name: wish for name, wish in meant.items() if name != "guidance_scale"}
    for chosen in (meant, unguided, {}):
        request = kind.model_validate({"task": task, "model": "m@1", **inputs, **NEEDED.get(task, {}), **chosen})
        try:
            spec.check_task(request, known(spec).as_json())
        except PydanticCustomError:
            continue
        return request
    return None


def requests(spec: TrainSpec, task: str, *, num_strangers: int) -> list[Any]:
    """One to look at, guided where that can be, and strangers who ask for other things."""
    chance = random.Random(5)
    asked = [request_of(spec, task, {"seed": 11, "steps": 4, "labels": [1], "guidance_scale": 2.5})]
    for seed in range(num_strangers):
        wishes = {"seed": seed, "labels": [chance.randrange(4)], "steps": chance.randint(2, 6)}
        wishes |= {"guidance_scale": chance.choice([1.0, 2.5]), "solver": chance.choice(["euler", "heun", "dpmpp_2m"])}
        wishes |= {"strength": chance.choice([0.5, 0.8, 1.0]), "average_of": chance.choice([1, 2])}
        wishes |= {"factor": chance.choice([2, 4]), "direction": chance.choice(["to_target", "to_source"])}
        wishes |= {"temperature": chance.choice([0.5, 1.0]), "reach": chance.choice([1.0, 3.0])}
        wishes |= {"style_weight": chance.choice([1.0, 50.0]), "num_points": chance.choice([4, 5])}
        asked.append(request_of(spec, task, wishes))
    return asked


def inputs_of(place: int) -> dict[str, torch.Tensor]:
    """Pictures, other ones at each place."""
    noise = Noise.of_step(Domain.TRAINING, 9, place, range(1), CPU)
    image, style = ((noise.uniform(*DATA.shape, stream=stream)[0] * 256).to(torch.uint8) for stream in (0, 1))
    mask = torch.zeros(1, *DATA.shape[1:], dtype=torch.uint8)
    mask[:, 3:8, 2 + place % 4 : 9] = 1
    return {"image": image, "style": style, "mask": mask}


def network(spec: TrainSpec) -> nn.Module:
    """With weights of which none is zero, as first weights often are on purpose."""
    net = build(FAMILIES[spec.model_dump()["family"]], spec, known(spec)).eval().requires_grad_(requires_grad=False)
    for place, parameter in enumerate(net.parameters()):
        noise = Noise.of_step(Domain.TRAINING, 3, place, range(1), CPU)
        parameter.add_(noise.normal(*parameter.shape)[0], alpha=0.02)
    return net


def drawn(spec: TrainSpec, net: nn.Module, asked: list[Any], *, late: int = 0) -> torch.Tensor:
    """What becomes of the first request; the last ``late`` of the others come when it is under way."""
    sampler = Exposed(FAMILIES[spec.model_dump()["family"]].tasks[asked[0].task](spec, known(spec)))
    has_inputs = "dataset" in type(asked[0]).model_fields
    draws = [
        Draw[Any](request=request, index=3, inputs=inputs_of(place) if has_inputs else None, owner=place)
        for place, request in enumerate(asked)
    ]
    return first_of(Tile(net, sampler, draws[-1], CPU), draws, late=late)


@pytest.fixture(autouse=True)
def short_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.families.diffusion.ENCODING_STEPS", ENCODING_STEPS)


@pytest.mark.parametrize("name", cases())
def test_what_comes_of_a_request_has_the_bits_it_has_alone(name: str) -> None:
    spec, task = cases()[name]
    net, asked = network(spec), requests(spec, task, num_strangers=6)

    alone = drawn(spec, net, asked[:1])

    assert torch.equal(drawn(spec, net, asked[:2]), alone)
    assert torch.equal(drawn(spec, net, asked, late=3), alone)


@pytest.mark.parametrize("family", USUAL)
def test_sixty_four_strangers_change_no_bit(family: str) -> None:
    spec, task = cases()[f"{family}-{USUAL[family]}"]
    net, asked = network(spec), requests(spec, task, num_strangers=63)

    assert torch.equal(drawn(spec, net, asked, late=20), drawn(spec, net, asked[:1]))


def test_another_process_makes_the_same_bits_of_every_request(tmp_path: Path) -> None:
    """One that was started afresh, with other strangers in another order."""
    path = tmp_path / "drawn.safetensors"

    subprocess.run([sys.executable, "-m", "tests.families.elsewhere", path, "every task"], check=True)

    there = load_file(path)
    with exact(1):
        here = {
            name: drawn(spec, network(spec), requests(spec, task, num_strangers=0))
            for name, (spec, task) in cases().items()
        }
    assert there.keys() == here.keys()
    assert [name for name in here if not torch.equal(here[name], there[name])] == []


def test_every_task_of_every_family_is_asked() -> None:
    told = {(spec.model_dump()["family"], task) for spec, task in cases().values()}

    assert told == {(family, task) for family in SPECS for task in SPECS[family].tasks}

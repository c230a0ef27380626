"""What specs say about networks at submission agrees with the networks themselves."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Final

import pytest
import torch
from pydantic import ValidationError
from pydantic_core import PydanticCustomError
from torch import nn

from shared.errors import DatasetInvalid
from shared.specs import FAMILIES as SPECS
from shared.specs.training import TrainSpec
from tests.jobs.variants import options
from worker.families import FAMILIES
from worker.families.family import DataInfo, Origin

DATASET: Final = "ds_" + "0" * 32
SHAPE: Final = (1, 12, 12)
CHOSEN: Final[dict[str, list[dict[str, Any]]]] = {
    "vae": [{}, {"network": "mlp"}, {"network": "ladder"}],
    "vq": [{}, {"quantizer": "ema"}],
    "gan": [{"network": network, "objective": "r3gan"} for network in ("mlp", "dcgan", "sngan", "r3gan")],
    "diffusion": [{}, {"network": "dit"}],
    "translation": [{}, {"objective": "contrastive"}],
}
"""Choices beside which others have to be tried; of families without any, none."""
NAMED: Final = frozenset({"family", "dataset", "model", "init_from", "autoencoder", "augment"})
"""Fields that name something, and ``augment``, of which is asked only whether there is any."""
VALUES: Final = (0, 0.25, 1, 2, 3, 5, 17, (0.25, 0.5), (4, 4), {"flip": 0.5})


def spec_of(family: str, **fields: Any) -> TrainSpec:
    kind = SPECS[family]
    needed = {"init_from": "base@1"} if kind.starts_from else {}
    needed |= dict.fromkeys(kind.further_datasets, "ds_" + "1" * 32)
    return kind.model_validate({"family": family, "dataset": DATASET, "model": "m", **needed, **fields})


def built(spec: TrainSpec, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    """Its network, without weights."""
    known = DataInfo(shape=shape, num_classes=3)
    base = Origin(family="diffusion", spec=spec_of("diffusion").model_dump(mode="json"), data=known)
    data = DataInfo(shape=shape, num_classes=3, models={"init_from": base} if spec.starts_from else {})
    family: Any = FAMILIES[spec.model_dump()["family"]]
    with torch.device("meta"):
        return family.build(spec, data)


def weights_of(spec: TrainSpec) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in built(spec).state_dict().items()}


def values_of(family: str, field: str) -> Iterator[Any]:
    """Values that the field may have instead of its default."""
    info = SPECS[family].model_fields[field]
    for value in options(info.annotation) or VALUES:
        with suppress(ValidationError):
            if getattr(spec_of(family, **{field: value}), field) != info.default:
                yield value


def altered(family: str, beside: dict[str, Any], fields: Iterable[str]) -> Iterator[TrainSpec]:
    """Specs in which all ``fields`` that can be have other values than a plain one's, until each had all its own."""
    values = {field: found for field in fields if (found := [*values_of(family, field)])}
    for turn in range(max(len(found) for found in values.values())):
        chosen = dict(beside)
        for field, found in values.items():
            with suppress(ValidationError):
                tried = {**chosen, field: found[turn % len(found)]}
                spec_of(family, **tried)
                chosen = tried
        yield spec_of(family, **chosen)


@pytest.mark.parametrize("family", SPECS)
def test_no_field_but_those_of_the_architecture_changes_which_weights_there_are(family: str) -> None:
    kind = SPECS[family]
    for beside in CHOSEN.get(family, [{}]):
        plain = weights_of(spec_of(family, **beside))
        free = sorted(kind.model_fields.keys() - kind.architecture - {*kind.further_datasets} - NAMED - beside.keys())

        for spec in altered(family, beside, free):
            assert weights_of(spec) == plain, spec


@pytest.mark.parametrize(
    ("family", "fields"), [("style", {"encoder": "digits"}), ("style", {"encoder": "vgg19"}), ("translation", {})]
)
def test_a_spec_refuses_the_images_that_its_network_refuses(family: str, fields: dict[str, Any]) -> None:
    spec, told, found = spec_of(family, **fields), set[tuple[int, ...]](), set[tuple[int, ...]]()
    for shape in [(channels, side, 9) for channels in (1, 2, 3, 4) for side in range(1, 10)]:
        try:
            spec.check_data({"dataset": {"shape": list(shape)}})
        except PydanticCustomError:
            told.add(shape)
        try:
            built(spec, shape)
        except DatasetInvalid:
            found.add(shape)

    assert told == found
    assert found

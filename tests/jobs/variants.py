"""Every way to train every registered family: a new family, and a new choice in its spec, are found by themselves."""

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from shared.specs import FAMILIES
from shared.specs.training import TrainSpec
from tests.engine.toy import ToySpec
from tests.jobs.conftest import DATASET_ID

SPECS: Final[Mapping[str, type[TrainSpec]]] = {**FAMILIES, "toy": ToySpec}
"""The registry, and a family of two parts with a buffer."""
PRECISIONS: Final = ("fp32", "bf16", "fp16")
SMALL: Final = 8
"""Sizes that are a family's own are no larger than this, where its spec allows it."""
COMMON: Final = {
    "dataset": DATASET_ID, "model": "m", "steps": 12, "batch_size": 6, "warmup_steps": 2, "checkpoint_every": 2,
    "preview_every": 9,
}  # fmt: skip


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """A name and the fields of a spec: each choice that a family has, alone, at every precision."""
    for family, kind in SPECS.items():
        plain = kind.model_validate(small(family, kind, {}))
        for choice in ({}, *choices(kind)):
            if "weights" in choice and "loss" not in plain.compared_by():
                continue  # refused without a figure's name
            if "recompute" in choice and not plain.has_blocks:
                continue  # refused
            if "compiled_from" in choice:
                continue  # by chance; what is compiled has tests of its own (test_switching.py)
            if "captured" in choice:
                continue  # nothing on CPUs; tests/families/test_captured_steps.py has it for all others
            for precision in PRECISIONS:
                name = "-".join([family, *(f"{field}={value}" for field, value in choice.items()), precision])
                yield name, small(family, kind, choice | {"precision": precision})


def together() -> dict[str, Any]:
    """Choices that could disturb each other: latents, whose scale the first batch decides, two averages and their
    copies, in bf16."""
    choice = {"autoencoder": "vq@1", "network": "dit", "ema": "power", "ema_snapshots": 4, "precision": "bf16"}
    return small("diffusion", FAMILIES["diffusion"], choice | {"checkpoint_every": 3, "preview_every": 5})


def choices(kind: type[TrainSpec]) -> Iterator[dict[str, Any]]:
    """The values that a field may have instead of its default, where they can be counted; a preset is but a size.

    A field that names a model to build on may name one of each family that it allows, by the family's name.
    """
    for name, families in kind.built_on.items():
        yield from ({name: f"{family}@1"} for family in sorted(families))
    for name, field in kind.model_fields.items():
        for value in options(field.annotation) if name not in ("family", "precision", "preset") else ():
            if value != field.default and (value, field.default) != (False, None):
                yield {name: value}


def options(annotation: Any) -> tuple[Any, ...]:
    """All values of a type; none if they cannot be counted."""
    if annotation is bool:
        return (True, False)
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return tuple(value for part in get_args(annotation) for value in options(part))
    return ()


def small(family: str, kind: type[TrainSpec], choice: Mapping[str, Any]) -> dict[str, Any]:
    """A spec with ``choice`` that trains in milliseconds, or with its own sizes where the small ones do not fit."""
    origins = {"init_from": "origin@1"} if kind.model_fields["init_from"].is_required() else {}
    further = {field: f"ds_{place:032x}" for place, field in enumerate(kind.further_datasets, 2)}
    fields = COMMON | {"family": family} | further | origins | dict(choice)
    own = {name: field for name, field in kind.model_fields.items() if name not in TrainSpec.model_fields}
    sizes = {name: smallest(field) for name, field in own.items() if field.annotation is int and name not in fields}
    for spec in (sizes | fields, fields):
        try:
            return kind.model_validate(spec).model_dump(mode="json")
        except ValidationError as error:
            refused = error
    raise refused


def smallest(field: FieldInfo) -> int:
    bounds = [rule.ge for rule in field.metadata if hasattr(rule, "ge")]
    return max([min(field.default, SMALL), *bounds])

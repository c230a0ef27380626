"""What a spec's fields may hold: a family that gives a common field another default keeps its bounds."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from shared.specs import FAMILIES, TrainSpec
from shared.specs.vq import MOST_CODES

REQUIRED = {"dataset": "ds_" + "0" * 32, "model": "m"}
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def adapter(info: FieldInfo) -> TypeAdapter[Any]:
    """Of one field by itself."""
    return TypeAdapter(Annotated[info.annotation, info])  # pyright: ignore[reportInvalidTypeForm]


def numbers(schema: Any) -> Iterator[float]:
    """The bounds anywhere in a JSON Schema."""
    if isinstance(schema, Mapping):
        yield from (schema[bound] for bound in BOUNDS if bound in schema)
        schema = [*schema.values()]
    for part in schema if isinstance(schema, list) else ():
        yield from numbers(part)


def allows(kind: type[TrainSpec], field: str, value: Any) -> bool:
    """Whether the field alone may have the value."""
    try:
        adapter(kind.model_fields[field]).validate_python(value)
    except ValidationError:
        return False
    return True


def bounded() -> Iterator[tuple[str, Any]]:
    """Each common field with values that it may not have: next to its bounds, alone and in pairs."""
    for field, info in TrainSpec.model_fields.items():
        bounds = set(numbers(adapter(info).json_schema()))
        near = sorted({number + by for number in bounds for by in (-1, 0, 1)})
        tried = [*near, *((number, 0.5) for number in near), *((0.5, number) for number in near)]
        yield from ((field, value) for value in tried if not allows(TrainSpec, field, value))


REFUSED = [*bounded()]


def test_common_fields_have_bounds() -> None:
    assert {"steps", "batch_size", "learning_rate", "betas", "grad_clip", "ema_decay"} <= {name for name, _ in REFUSED}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_loosens_a_bound_that_it_inherits(family: str) -> None:
    loosened = [(name, value) for name, value in REFUSED if allows(FAMILIES[family], name, value)]

    assert not loosened


def test_a_prior_over_more_codes_than_a_matrix_has_room_for_is_refused() -> None:
    spec = REQUIRED | {"family": "vq"}

    assert FAMILIES["vq"].model_validate(spec | {"levels": [64, 64, 64]})
    with pytest.raises(ValidationError, match=f"at most {MOST_CODES}") as refused:
        FAMILIES["vq"].model_validate(spec | {"levels": [64, 64, 64, 2]})

    assert [error["loc"] for error in refused.value.errors()] == [("levels",)]

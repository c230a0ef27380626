"""Fields that mean something beside some choices only: refused when they are submitted elsewhere, and never when they
are read again."""

import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, Final

import pytest
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from shared.described import descriptions
from shared.errors import InvalidSpec
from shared.specs import FAMILIES, TrainSpec
from tests.jobs.variants import options
from tests.shared.desk import Desk

CHOICES: Final = ("network", "objective", "quantizer", "preset", "ema", "class_conditional", "encoder")
VALUES: Final = (0.25, 0.5, 1.5, 2, 3, 7, 16, (4, 4), {"num_train_timesteps": 500})
"""Among which each number, and the levels of codes, find one that they may have instead of their default."""
RULES: Final = [(family, field) for family, kind in FAMILIES.items() for field in kind.used_with]


def spec_of(family: str, **fields: Any) -> TrainSpec:
    kind = FAMILIES[family]
    needed = {"init_from": "other@1"} if kind.starts_from else {}
    needed |= dict.fromkeys(kind.further_datasets, "ds_" + "1" * 32)
    return kind.model_validate({"family": family, "dataset": "ds_" + "0" * 32, "model": "m", **needed, **fields})


def values_of(family: str, field: str) -> tuple[Any, ...]:
    return options(FAMILIES[family].model_fields[field].annotation)


def refused(spec: TrainSpec) -> str | None:
    """The field that the spec is refused for when it is submitted."""
    try:
        spec.check_fields()
    except PydanticCustomError as error:
        return (error.context or {})["field"]
    return None


def otherwise(family: str, field: str, beside: Mapping[str, Any]) -> TrainSpec:
    """A spec whose ``field`` is not what it is by itself."""
    plain = spec_of(family, **beside)
    for value in VALUES:
        try:
            spec = spec_of(family, **beside, **{field: value})
        except ValidationError:
            continue
        if getattr(spec, field) != getattr(plain, field):
            return spec
    raise AssertionError(f"no value for {field}")


def beside(family: str, field: str) -> Iterator[tuple[dict[str, Any], bool]]:
    """Every choice of the fields that this one depends on, and whether it means something there."""
    needed = FAMILIES[family].used_with[field]
    for values in product(*(values_of(family, other) for other in needed)):
        chosen = dict(zip(needed, values, strict=True))
        yield chosen, all(value in needed[other] for other, value in chosen.items())


@pytest.mark.parametrize(("family", "field"), RULES)
def test_a_field_is_refused_where_it_means_nothing(family: str, field: str) -> None:
    found = {str(chosen): refused(otherwise(family, field, chosen)) for chosen, _ in beside(family, field)}

    assert found == {str(chosen): None if used else field for chosen, used in beside(family, field)}
    assert set(found.values()) == {None, field}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_presets_bring_and_what_was_stored_is_never_refused(family: str) -> None:
    known = [field for field in CHOICES if field in FAMILIES[family].model_fields]
    for values in product(*(values_of(family, field) for field in known)):
        spec = spec_of(family, **dict(zip(known, values, strict=True)))
        stored = FAMILIES[family].model_validate(spec.model_dump(mode="json"))

        assert (refused(spec), refused(stored)) == (None, None), spec


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_that_says_it_is_for_one_choice_only_has_a_rule(family: str) -> None:
    told = descriptions(FAMILIES[family]).items()
    said = {field for field, text in told if re.search(r"\(``\w+``[^)]* only\)", text)}

    assert said <= FAMILIES[family].used_with.keys()


def test_only_what_was_given_counts_as_set() -> None:
    """What a client did not write must not be sent by it, or stand in the way of what follows from other fields."""
    given = {"family": "gan", "dataset": "ds_" + "0" * 32, "model": "m", "network": "sngan", "preset": "s"}
    spec = FAMILIES["gan"].model_validate(given)

    assert spec.model_fields_set == set(given)
    assert spec.model_dump(include={"objective", "critic_steps"}) == {"objective": "hinge", "critic_steps": 5}


def test_a_submission_points_at_the_field(desk: Desk) -> None:
    spec = {"family": "vae", "dataset": f"ds_{desk.dataset_id.hex}", "model": "m", "hidden_dim": 64}

    with pytest.raises(InvalidSpec, match="it is for network mlp") as refusal:
        desk.submit(spec=spec)

    assert refusal.value.pointer == "/spec/hidden_dim"
    assert desk.submit(spec=spec | {"network": "mlp"})

"""Specs are stored with their defaults written out, and read again by the worker."""

import json

import pytest
from pydantic import TypeAdapter, ValidationError

from shared.specs import FAMILIES
from shared.wire import TrainRequest
from tests.jobs.variants import small

REQUIRED = {"dataset": "ds_" + "0" * 32, "model": "digits"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 60, 100_000])
def test_a_stored_spec_says_the_same_when_it_is_read_again(family: str, steps: int) -> None:
    needed = {"init_from": "other@1"} if FAMILIES[family].starts_from else {}
    needed |= dict.fromkeys(FAMILIES[family].further_datasets, "ds_" + "1" * 32)
    spec = FAMILIES[family].model_validate(REQUIRED | needed | {"family": family, "steps": steps})

    assert FAMILIES[family].model_validate(spec.model_dump(mode="json")) == spec


def test_a_warmup_longer_than_the_training_is_refused() -> None:
    with pytest.raises(ValidationError, match="warmup_steps"):
        FAMILIES["vae"].model_validate(REQUIRED | {"family": "vae", "steps": 10, "warmup_steps": 11})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("field", ["network", "objective", "preset"])
@pytest.mark.parametrize("value", [{}, [1]])
def test_a_choice_that_is_no_text_is_refused_at_its_field(family: str, field: str, value: object) -> None:
    with pytest.raises(ValidationError) as refused:
        FAMILIES[family].model_validate(REQUIRED | {"family": family, field: value})

    assert (field,) in [error["loc"] for error in refused.value.errors()]


def test_a_preset_decides_the_sizes_that_are_left_out() -> None:
    def sizes(**fields: object) -> tuple[object, ...]:
        spec = FAMILIES["vae"].model_validate(REQUIRED | {"family": "vae"} | fields)
        return tuple(spec.model_dump(include={"base_channels", "latent_dim", "hidden_dim"}).values())

    assert sizes() == sizes(preset="xs") != sizes(preset="s") != sizes(preset="b")
    assert sizes(preset="b", latent_dim=7)[0] == 7
    assert sizes(preset="b", network="ladder")[0] == sizes(preset="xs", network="ladder")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_a_training_can_be_given_in_strict_json(family: str) -> None:
    """As the API reads it. Lists among them are no tuples to a validator that has seen the whole spec."""
    kind = FAMILIES[family]
    spec = kind.model_validate({name: value for name, value in small(family, kind, {}).items() if value is not None})
    body = {"type": "train", "spec": spec.model_dump(mode="json", exclude_none=True)}

    read = TypeAdapter(TrainRequest).validate_json(json.dumps(body), strict=True)

    assert read.spec == spec

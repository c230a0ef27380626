"""What is recorded of the quality cases is of the cases as they are."""

import json
import operator
from pathlib import Path
from typing import Any

import pytest

from bench.quality_cases import CASES

RECORDED = sorted((Path(__file__).parents[2] / "bench/results/quality").glob("*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_result_is_of_the_recipe_and_the_thresholds_of_its_case(path: Path) -> None:
    result = json.loads(path.read_text("utf-8"))
    case = CASES[result["case"]]

    recipe = type(case.spec).model_validate(result["spec"] | _named(case.spec))
    asked = [{"figure": one.figure, one.sense: one.bound} for one in case.asked]

    assert result["case"] == path.stem
    assert recipe == case.spec
    assert [{name: value for name, value in one.items() if name != "reached"} for one in result["asked"]] == asked


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_what_is_said_to_be_reached_follows_from_the_figures(path: Path) -> None:
    result = json.loads(path.read_text("utf-8"))
    senses = {"at_least": operator.ge, "at_most": operator.le}

    for one in result["asked"]:
        [(sense, bound)] = [(sense, one[sense]) for sense in senses if sense in one]
        assert one["reached"] == senses[sense](result["figures"][one["figure"]], bound), one["figure"]
    assert result["reached"] == all(one["reached"] for one in result["asked"])


def test_every_case_is_recorded() -> None:
    assert {path.stem for path in RECORDED} == set(CASES)


def _named(spec: Any) -> dict[str, str]:
    return spec.model_dump(include={"dataset", "model"})

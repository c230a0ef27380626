"""Aliases from Python and from the command line, against the real API with real SQL."""

import json
from uuid import uuid4

import pytest
from typer.testing import CliRunner, Result

from noisemill.cli import app
from noisemill.client import Client
from noisemill.errors import ApiError, InvalidInput
from shared.specs.gate import Bound
from tests.client.conftest import API_KEY
from tests.client.hand import Hand

GATE = ["--at-most", "frechet_distance=12", "--no-worse", "coverage"]


@pytest.fixture
def model(real: Client, hand: Hand, dataset_id: str) -> str:
    """A model of two versions, of which the second draws less of what there is."""
    name = f"m{uuid4().hex[:12]}"
    for version, coverage in ((1, 0.9), (2, 0.8)):
        real.train(family="vae", dataset=dataset_id, model=name, steps=100)
        hand.train(hand.claim("train"))
        real.evaluate(model=f"{name}@{version}", dataset=dataset_id)
        digests = {"features": "f", "reference": "r"}
        told = {"frechet_distance": (10.0, [9.0, 11.0]), "coverage": (coverage, [0.7, 1.0])}
        figures = {
            metric: {"value": value, "confidence_95": interval, "num_samples": 100} | digests
            for metric, (value, interval) in told.items()
        }
        hand.succeed(hand.claim("generate"), figures=figures)
    return name


@pytest.fixture
def run(api_url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NOISEMILL_URL", api_url)
    monkeypatch.setenv("NOISEMILL_API_KEY", API_KEY)

    def run(*arguments: str, exit_code: int = 0) -> Result:
        result = CliRunner().invoke(app, ["alias", *arguments])
        assert result.exit_code == exit_code, result.output
        return result

    return run


def test_a_name_is_made_moved_listed_and_removed(real: Client, model: str):
    ref = f"{model}@production"

    made = real.aliases.move(ref, 1, gate=[Bound(metric="frechet_distance", at_most=12.0)])
    moved = real.aliases.move(ref, 2, was=1)

    assert (made.ref, made.version, moved.version, moved.gate) == (ref, 1, 2, made.gate)
    assert [alias.ref for alias in real.aliases.list(model)] == [ref] and real.model_version(ref).version == 2
    assert [(move.from_version, move.to_version) for move in real.aliases.moves(ref)] == [(1, 2), (None, 1)]
    drawn = real.generate(model=ref)
    assert drawn.spec["model"] == f"{model}@2"
    real.cancel(drawn.id)  # or the next test's hand would take it for its own
    real.aliases.remove(ref)
    assert list(real.aliases.list(model)) == []


def test_a_move_from_another_version_than_was_thought_is_refused(real: Client, model: str):
    ref = f"{model}@production"
    real.aliases.move(ref, 1)

    with pytest.raises(ApiError) as refused:
        real.aliases.move(ref, 2, was=2)

    assert refused.value.code == "precondition_failed" and real.aliases.get(ref).version == 1


@pytest.mark.parametrize("ref", ["digits", "digits@", "@production"])
def test_what_names_no_alias_is_not_sent(real: Client, ref: str):
    with pytest.raises(InvalidInput, match="as in digits@production"):
        real.aliases.get(ref)


def test_the_command_line_tells_which_bounds_do_not_hold(run, model: str):
    ref = f"{model}@production"
    made = run("set", ref, "1", *GATE)

    refused = run("set", ref, "2", exit_code=1)
    as_json = json.loads(run("set", ref, "2", "--json", exit_code=1).stdout)

    assert made.stdout.split() == [ref, "is", f"{model}@1"]
    assert "coverage is 0.8, and 0.9 of the current version; higher is better" in refused.stderr
    assert [check["passed"] for check in as_json["checks"]] == [True, False]


def test_the_command_line_shows_gate_and_history(run, model: str):
    ref = f"{model}@production"
    run("set", ref, "1", *GATE)
    run("set", ref, "1", "--no-gate")
    run("set", ref, "2", "--was", "1")

    history = json.loads(run("history", ref, "--json").stdout)
    shown = json.loads(run("show", ref, "--json").stdout)
    run("delete", ref)

    assert [(move["from_version"], move["to_version"], len(move["gate"])) for move in history] == [
        (1, 2, 0),
        (1, 1, 0),
        (None, 1, 2),
    ]
    assert (shown["version"], shown["gate"]) == (2, [])
    assert "No aliases" in run("list", model).stderr


@pytest.mark.parametrize(
    "wrong", [["--at-most", "frechet_distance"], ["--at-least", "psnr=good"], ["--no-gate", *GATE]]
)
def test_wrong_options_are_refused_before_anything_is_sent(run, wrong: list[str]):
    assert "--" in run("set", "digits@production", "1", *wrong, exit_code=2).stderr

"""Blocks that are computed by compiled code: the same up to rounding, in the same network, and only what was tried."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from shared.specs import FAMILIES as SPECS
from tests.engine.conftest import CPU, bars, small_spec
from worker.engine.blocks import Call, CompilationFailed, blocks_of, code_key, compile_blocks, plain, recorded
from worker.engine.training import Trainer
from worker.families import FAMILIES
from worker.families.family import DataInfo

SMALL: Mapping[str, Mapping[str, Any]] = {
    "unet": {"family": "diffusion"},
    "unet-dropout-recomputed": {"family": "diffusion", "dropout": 0.3, "recompute": True},
    "dit": {"family": "diffusion", "network": "dit"},
    "unet-pure_bf16": {"family": "diffusion", "precision": "pure_bf16"},
    "dit-pure_bf16": {"family": "diffusion", "network": "dit", "precision": "pure_bf16"},
    "vae": {"family": "vae", "base_channels": 8},
    "ladder": {"family": "vae", "network": "ladder", "base_channels": 8, "latent_dim": 2},
    "vq": {"family": "vq", "prior_start": 0.0},
}
"""Every network that declares blocks, as small as it gets."""
COUNTING = (sys.executable, "-m", "tests.engine.compiled")


def trainer_of(name: str, **fields: Any) -> Trainer[Any, Any]:
    common = {"dataset": "ds_" + "0" * 32, "model": "m", "batch_size": 4, "steps": 8, "warmup_steps": 0}
    given = {**common, **SMALL[name], **fields}
    spec = SPECS[given["family"]].model_validate(given)
    return Trainer(FAMILIES[given["family"]], spec, DataInfo(shape=(1, 12, 12)), CPU)


def batch_at(step: int) -> dict[str, Tensor]:
    return {"image": bars()[4 * step :][:4]}


def calls_of(trainer: Trainer[Any, Any]) -> list[Call]:
    with recorded(trainer.computing) as calls:
        trainer.advance(batch_at(trainer.step))
    return calls


def one_of_each(trainer: Trainer[Any, Any], calls: list[Call]) -> list[Call]:
    """The first call of each class of blocks: compiling takes seconds for each, and others stay plain."""
    classes = {type(trainer.computing.get_submodule(call.block)): call for call in reversed(calls)}
    return list(classes.values())


def compile_now(trainer: Trainer[Any, Any], calls: list[Call], folder: Path) -> None:
    with trainer.numerics.products():
        compile_blocks(trainer.computing, calls, CPU, folder)
    trainer.numerics = trainer.numerics.switched(trainer.step)


def num_compiled() -> int:
    """How often torch's compiler has been at work in this process."""
    return sum(torch._dynamo.utils.counters["stats"].values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests find what others have compiled."""
    return tmp_path_factory.mktemp("code")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SMALL)
def test_compiled_steps_are_plain_steps_up_to_rounding(name: str, folder: Path) -> None:
    compiled, by_hand = trainer_of(name), trainer_of(name)
    compile_now(compiled, one_of_each(compiled, calls_of(compiled)), folder)
    by_hand.advance(batch_at(0))
    before = num_compiled()

    found = [compiled.advance(batch_at(step)) for step in (1, 2)]

    expected = [by_hand.advance(batch_at(step)) for step in (1, 2)]
    bound = 1e-3 if compiled.numerics.precision == "fp32" else 0.05  # a code may be another one by rounding
    assert [one["grad_norm" if "grad_norm" in one else "autoencoder_grad_norm"] for one in found] == pytest.approx(
        [one["grad_norm" if "grad_norm" in one else "autoencoder_grad_norm"] for one in expected], rel=bound
    )
    assert num_compiled() == before, "a step was compiled"
    assert compiled.checkpoint().tensors.keys() == by_hand.checkpoint().tensors.keys()


def test_one_call_stands_for_all_blocks_of_a_kind() -> None:
    trainer = trainer_of("dit")

    calls = calls_of(trainer)

    assert len(blocks_of(trainer.computing)) == 6
    assert [call.block for call in calls] == ["network.blocks.0"]


def test_calls_survive_a_checkpoint() -> None:
    calls = calls_of(trainer_of("vae"))

    assert [Call.from_json(call.as_json()) for call in calls] == calls


def test_compiled_code_of_another_network_has_another_name() -> None:
    first, second, wider = trainer_of("vae"), trainer_of("vae", seed=3), trainer_of("vae", base_channels=16)
    names = [code_key(one.computing, calls_of(one), CPU) for one in (first, second, wider)]

    assert names[0] == names[1] != names[2]


def test_what_cannot_be_compiled_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    trainer = trainer_of("vae")
    [call, *rest] = calls_of(trainer)
    foreign = Call.from_json({**call.as_json(), "block": "no.such.block"})

    with pytest.raises(CompilationFailed):
        compile_blocks(trainer.computing, [foreign, *rest], CPU, tmp_path)

    assert all(block._compiled_call_impl is None for block in blocks_of(trainer.computing).values())


def test_code_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a compiler's bug would be: the compiled block is another function than the plain one."""
    trainer = trainer_of("vae")
    calls = calls_of(trainer)

    def louder(graph: Any, inputs: Any) -> Any:
        return lambda *given: [1.1 * made for made in graph(*given)]

    def broken(block: torch.nn.Module, **how: Any) -> None:
        block._compiled_call_impl = torch.compile(block._call_impl, backend=louder, dynamic=False)

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    with pytest.raises(CompilationFailed, match="something else"):
        compile_blocks(trainer.computing, calls, CPU, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_another_process_finds_the_code_and_compiles_nothing(tmp_path: Path) -> None:
    first, second = (
        json.loads(subprocess.run([*COUNTING, str(tmp_path)], capture_output=True, text=True, check=True).stdout)
        for _ in range(2)
    )

    assert first["misses"] > 0 and first["hits"] == 0
    assert second["misses"] == 0 and second["hits"] > 0
    assert second["losses"] == first["losses"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_shape_that_was_not_tried_is_computed_by_plain_code(folder: Path) -> None:
    compiled, by_hand = trainer_of("vae"), trainer_of("vae")
    compile_now(compiled, calls_of(compiled), folder)
    by_hand.advance(batch_at(0))
    before = num_compiled()
    fewer = {"image": bars()[:3]}

    assert compiled.advance(fewer) == by_hand.advance(fewer)
    assert num_compiled() == before


def test_a_network_goes_back_to_plain_code() -> None:
    trainer = trainer_of("vae")
    for block in blocks_of(trainer.computing).values():
        block._compiled_call_impl = lambda *inputs: pytest.fail("compiled code was called")

    plain(trainer.computing)

    trainer.advance(batch_at(0))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"network": "mlp", "compiled_from": "auto"}, "no repeated blocks"),
        ({"network": "conv", "compiled_from": 8}, "below steps"),
        ({"network": "conv", "compiled_from": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused(fields: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        small_spec(**fields)


@pytest.mark.parametrize(
    ("asked", "switched_at", "is_repeatable"),
    [(None, (), True), (5, (5,), True), (5, (), False), (5, (5, 7), False), ("auto", (3,), False), ("auto", (), False)],
)
def test_only_a_switch_that_was_planned_can_be_repeated(asked: Any, switched_at: Any, is_repeatable: bool) -> None:
    trainer = trainer_of("vae", compiled_from=asked)
    for step in switched_at:
        trainer.numerics = trainer.numerics.switched(step)

    assert trainer.numerics.is_repeatable(trainer.spec) is is_repeatable

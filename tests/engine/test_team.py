"""Several processes train as one does: the same figures, the same gradient, and one set of weights."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.errors import TrainingIndivisible
from shared.specs import FAMILIES as SPECS
from tests.engine import teamwork
from tests.engine.conftest import CPU, DATA, small_spec
from tests.jobs.variants import small
from worker.engine.checkpoint import Checkpoint, read_tensors
from worker.engine.numerics import exact
from worker.engine.team import ALONE, Team
from worker.engine.training import Trainer
from worker.families import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ONE_STEP = [name for name in teamwork.CASES if name.startswith("one-")]
TRAININGS = ["fp32", "augmented", "resumed"]
LOOSE = 1e-3
"""Of weights after six steps in fp32: a sum in another order, through Adam's quotient of two small numbers."""


@dataclass
class Outcome:
    """What one process made of one case."""

    tensors: Mapping[str, Tensor]
    figures: Mapping[str, float]
    numerics: Mapping[str, Any]

    def under(self, *prefixes: str) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefixes)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes have done all cases, as ``torchrun`` would start them."""
    folder = tmp_path_factory.mktemp("team")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.engine.teamwork", str(folder)]
    processes = [subprocess.Popen(command, env={**os.environ, **world, "RANK": rank}) for rank in "01"]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Callable[[str, int], Outcome]:
    """What a process made of a case."""

    def read(name: str, rank: int = 0) -> Outcome:
        tensors, header = read_tensors(folder / f"{name}.{rank}")
        return Outcome(tensors, header["figures"], header["numerics"])

    return read


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[str], Outcome]:
    """What one process makes of it."""
    (folder / "alone").mkdir()

    def make(name: str) -> Outcome:
        path = folder / "alone" / name
        with exact(1):
            teamwork.write(*teamwork.CASES[name](ALONE, folder), path)
        tensors, header = read_tensors(path)
        return Outcome(tensors, header["figures"], header["numerics"])

    return make


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Of two sets of tensors, in units of the second one's norm."""
    assert one.keys() == other.keys()
    squares = [((one[name].double() - tensor.double()) ** 2).sum() for name, tensor in other.items()]
    return float(sum(squares) ** 0.5 / sum((tensor.double() ** 2).sum() for tensor in other.values()) ** 0.5)


@pytest.mark.parametrize("name", ONE_STEP)
def test_a_step_of_two_has_the_gradient_of_the_whole_batch(
    outcome: Callable[..., Outcome], alone: Callable[[str], Outcome], name: str
) -> None:
    together, expected = outcome(name), alone(name)

    assert distance(together.under("gradient."), expected.under("gradient.")) < 1e-4
    # What is told of all codes of a batch is told of each process's, and averaged.
    own = {figure: value for figure, value in expected.figures.items() if figure not in ("perplexity", "usage")}
    assert {figure: together.figures[figure] for figure in own} == pytest.approx(own, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", list(teamwork.CASES))
def test_both_processes_have_the_same_bits(outcome: Callable[..., Outcome], name: str) -> None:
    first, second = outcome(name, 0), outcome(name, 1)

    assert first.figures == second.figures
    assert first.numerics == second.numerics
    assert first.tensors.keys() == second.tensors.keys()
    assert [name for name, tensor in first.tensors.items() if not torch.equal(tensor, second.tensors[name])] == []


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_of_two_is_that_of_one_with_the_whole_batch(
    outcome: Callable[..., Outcome], alone: Callable[[str], Outcome], name: str
) -> None:
    together, expected = outcome(name), alone(name)

    assert together.figures == pytest.approx(dict(expected.figures), rel=1e-4)
    assert distance(together.under("net.", "average"), expected.under("net.", "average")) < LOOSE


def test_a_training_that_others_go_on_with_is_that_of_those_who_began_it(outcome: Callable[..., Outcome]) -> None:
    straight, resumed = outcome("fp32"), outcome("resumed")

    assert straight.figures == resumed.figures
    assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in straight.tensors.items())


def test_a_checkpoint_of_two_is_taken_up_by_one(folder: Path, alone: Callable[[str], Outcome]) -> None:
    checkpoint = Checkpoint.read(folder / "half-2")
    spec = FAMILIES["vae"].spec.model_validate(checkpoint.spec)

    trainer = Trainer.resume(FAMILIES["vae"], spec, DATA, CPU, checkpoint)
    teamwork.advanced(trainer, 4)

    assert (trainer.numerics.num_processes, trainer.numerics.regrouped_at) == (1, (2,))
    assert not trainer.numerics.is_repeatable(trainer.spec)
    net = {f"net.{name}": tensor for name, tensor in trainer.net.state_dict().items()}
    assert distance(net, alone("fp32").under("net.")) < LOOSE


def test_a_process_that_runs_out_of_memory_halves_what_all_do_at_once(outcome: Callable[..., Outcome]) -> None:
    numerics = outcome("cramped", 0).numerics

    assert (numerics["micro_batch"], numerics["halved_at"]) == (2, [0])


def indivisible() -> list[dict[str, Any]]:
    return [
        {"family": "gan", "network": "dcgan"},
        {"family": "gan", "network": "sngan"},
        {"family": "vq", "quantizer": "ema"},
        {"family": "diffusion", "autoencoder": "vae@1"},
    ]


@pytest.mark.parametrize("fields", indivisible(), ids=str)
def test_a_training_whose_samples_depend_on_one_another_is_refused(fields: dict[str, Any]) -> None:
    family = fields["family"]
    spec = SPECS[family].model_validate(small(family, SPECS[family], fields))

    with pytest.raises(TrainingIndivisible, match="at most 1"):
        Trainer(FAMILIES[family], spec, teamwork.data_of(spec), CPU, team=Team(0, 2))


def test_more_processes_than_samples_are_refused() -> None:
    with pytest.raises(TrainingIndivisible, match="at most 3"):
        Trainer(FAMILIES["vae"], small_spec(batch_size=3), DATA, CPU, team=Team(0, 4))


@pytest.mark.parametrize(("num_rows", "size"), [(5, 2), (16, 3), (7, 7), (128, 1)])
def test_each_row_of_a_batch_is_one_processs(num_rows: int, size: int) -> None:
    shares = [Team(rank, size).rows(num_rows) for rank in range(size)]

    assert [row for rows in shares for row in rows] == list(range(num_rows))
    assert max(map(len, shares)) == Team(0, size).most_rows(num_rows)
    assert min(map(len, shares)) >= 1

"""One training on several devices of a worker: it is the one it would be, and a process that dies costs a retry."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.errors import WorkerLost
from tests.jobs.folder_run import FolderRun
from worker.engine.checkpoint import read_tensors
from worker.jobs.train import train
from worker.run import Stopped
from worker.runner import devices_from

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FP32 = {"precision": "fp32", "preview_every": 6}


def weights(run: FolderRun) -> dict[str, Tensor]:
    [found] = [artifact for artifact in run.artifacts("weights") if artifact.name == "model.safetensors"]
    return read_tensors(run.folder / found.stored.key)[0]


def children() -> list[int]:
    """Processes that this one started."""
    lists = Path("/proc/self/task").glob("*/children")
    return [int(one) for listed in lists for one in listed.read_text().split()]


def test_two_devices_train_what_one_does(train_run: Callable[..., FolderRun]) -> None:
    one, two = train_run(**FP32), train_run(**FP32)
    two.num_devices = 2

    alone, together = train(one), train(two)

    assert together["fingerprint"]["num_processes"] == 2
    assert [step for step, *_ in two.steps] == [step for step, *_ in one.steps]
    assert together["metrics"]["held_out"] == pytest.approx(alone["metrics"]["held_out"], rel=1e-3)
    expected = weights(one)
    assert all(torch.allclose(tensor, expected[name], atol=1e-3) for name, tensor in weights(two).items())
    assert two.logs == []


def test_a_training_of_two_that_is_interrupted_goes_on_to_the_same_bits(train_run: Callable[..., FolderRun]) -> None:
    straight, broken = train_run(**FP32), train_run(**FP32)
    straight.num_devices = broken.num_devices = 2
    train(straight)
    broken.stop_at = (7, "interrupt")
    with pytest.raises(Stopped):
        train(broken)

    resumed = train_run(**FP32, resume=[broken])
    resumed.num_devices = 2
    result = train(resumed)

    assert resumed.logs == ["Going on from step 7."]
    assert result["reproducibility"] != "none"
    expected = weights(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())


def test_a_process_that_dies_ends_the_attempt_so_that_another_follows(train_run: Callable[..., FolderRun]) -> None:
    run = train_run(**FP32)
    run.num_devices = 2
    before = set(children())
    run.before_publish = lambda kind: [os.kill(one, signal.SIGKILL) for one in set(children()) - before]

    with pytest.raises(WorkerLost, match="beside this one died"):
        train(run)

    assert WorkerLost.retryable
    assert set(children()) <= before


def test_a_training_that_cannot_be_shared_is_done_by_one(train_run: Callable[..., FolderRun]) -> None:
    fields: dict[str, Any] = {"family": "gan", "network": "dcgan", "base_channels": 8, "latent_dim": 4, "steps": 1}
    base = {name: train_run().assignment.spec[name] for name in ("dataset", "model", "batch_size")}
    run = train_run(base=base, **fields)
    run.num_devices = 2

    result = train(run)

    assert result["fingerprint"]["num_processes"] == 1
    assert "can be shared by 1 of the worker's 2 devices" in run.logs[0]


@pytest.mark.parametrize(
    ("first", "num", "devices"),
    [
        ("cpu", 2, ["cpu", "cpu"]),
        ("cuda:1", 2, ["cuda:1", "cuda:2"]),
        ("cuda", 1, ["cuda:0"]),
        ("cuda:0", 1, ["cuda:0"]),
    ],
)
def test_the_devices_of_a_training_follow_each_other(first: str, num: int, devices: list[str]) -> None:
    assert devices_from(first, num) == devices

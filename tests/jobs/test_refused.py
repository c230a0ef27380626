"""A job that memory cannot hold is told what it takes and what there is, before it takes any."""

from collections.abc import Callable
from typing import Any

import pytest

from shared.errors import OutOfMemory
from tests.jobs.folder_run import FolderRun
from tests.jobs.test_generate import served
from worker.engine.models import MODELS
from worker.jobs.generate import generate
from worker.jobs.train import train
from worker.run import Parted

MakeRun = Callable[..., FolderRun]


@pytest.fixture
def trained(train_run: MakeRun) -> dict[str, Any]:
    return train(train_run(steps=2))


def test_a_model_larger_than_memory_is_not_even_fetched(
    generate_run: MakeRun, trained: dict[str, Any], small_machine: Callable[[int], None]
) -> None:
    MODELS.drop_unused()
    small_machine(2**30)
    weights = trained["weights"] | {"size_bytes": 2**40, "key": "nowhere"}

    with pytest.raises(OutOfMemory, match=r"the model bars@1 takes at least 1024.00 GiB .* cpu has 1.00 GiB"):
        generate(generate_run(trained | {"weights": weights}))


def test_samples_that_cannot_be_kept_until_they_are_stored(
    generate_run: MakeRun, trained: dict[str, Any], small_machine: Callable[[int], None]
) -> None:
    generate(generate_run(trained, num_samples=1))
    small_machine(64 * 1024)

    with pytest.raises(OutOfMemory, match=r"until they are stored takes at least .* \(119808 bytes\)"):
        generate(generate_run(trained, num_samples=4096))
    assert generate(generate_run(trained, num_samples=16))["num_samples"] == 16


def test_a_step_that_cannot_be_done_alone_is_refused_before_any(
    generate_run: MakeRun, trained: dict[str, Any], small_machine: Callable[[int], None]
) -> None:
    generate(generate_run(trained, task="traverse", num_dimensions=1, num_points=2))
    small_machine(1024)
    run = generate_run(trained, num_samples=1)

    with pytest.raises(
        OutOfMemory, match=r"a step of one sample, .* takes at least .* cpu has 0.00 GiB \(1024 bytes\)"
    ):
        generate(run)
    assert not run.steps


def test_beside_others_nobody_is_refused_for_what_these_have_taken(
    generate_run: MakeRun,
    trained: dict[str, Any],
    small_machine: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate(generate_run(trained, num_samples=1))
    first = generate_run(trained, num_samples=20)
    second = generate_run(trained, task="traverse", num_dimensions=1, num_points=2)

    # When the second one is about to begin.
    monkeypatch.setattr(second, "found_model", lambda *, was_loaded: small_machine(1024))
    together = served(first, second)

    assert together[0]["num_samples"] == 20
    assert isinstance(together[1], Parted)


def test_a_training_whose_state_does_not_fit_is_refused_at_its_start(
    train_run: MakeRun, small_machine: Callable[[int], None]
) -> None:
    small_machine(32 * 1024)
    run = train_run(steps=2)

    with pytest.raises(OutOfMemory, match="a training with its weights, their average, gradients and moments takes"):
        train(run)
    assert run.phases == ["loading_data"]

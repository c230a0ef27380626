"""What a training reads of several datasets: as many samples of each, never in pairs."""

from collections.abc import Callable
from threading import current_thread
from typing import Any

import numpy as np
import pytest

from shared.errors import DatasetInvalid
from shared.specs import TranslationSpec
from worker.data.dataset import ImageDataset
from worker.engine.team import ALONE, Team
from worker.jobs.batches import Batches

SPEC = TranslationSpec(
    family="translation", dataset="ds_" + "0" * 32, target_dataset="ds_" + "1" * 32, model="m", batch_size=8
)


def numbered(num: int, *, num_held_out: int = 0, side: int = 2, labels: bool = False) -> ImageDataset:
    """Images whose every byte is their place; the last ones are held out."""
    images = np.broadcast_to(np.arange(num, dtype=np.uint8)[:, None, None, None], (num, 1, side, side))
    split = (np.arange(num) >= num - num_held_out).astype(np.uint8)
    return ImageDataset(shards=[images], split=split, labels=np.arange(num) if labels else None, captions_path=None)


def places(batches: Batches, step: int, name: str) -> list[int]:
    return batches.at(step)[name][:, 0, 0, 0].tolist()


def test_two_datasets_are_not_read_in_pairs() -> None:
    batches = Batches({"image": numbered(40), "target_dataset": numbered(40)}, SPEC)

    first, second = ([place for step in range(5) for place in places(batches, step, name)] for name in batches.datasets)

    assert sorted(first) == sorted(second) == list(range(40))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 6


def test_labels_are_the_first_dataset_s() -> None:
    batches = Batches({"image": numbered(40, labels=True), "target_dataset": numbered(30, labels=True)}, SPEC)

    assert batches.at(3)["label"].tolist() == places(batches, 3, "image")


def test_datasets_of_different_shapes_are_refused() -> None:
    with pytest.raises(DatasetInvalid, match="target_dataset has samples of"):
        Batches({"image": numbered(9), "target_dataset": numbered(9, side=3)}, SPEC)


def test_a_split_is_measured_where_every_dataset_has_it() -> None:
    both = {"image": numbered(40, num_held_out=10), "target_dataset": numbered(30, num_held_out=6)}
    one = {"image": numbered(40, num_held_out=10), "target_dataset": numbered(30)}

    assert Batches(both, SPEC).measured(100) == {"train": 6, "held_out": 6}
    assert Batches(one, SPEC).measured(25) == {"train": 25}


def test_what_is_measured_is_the_first_of_each() -> None:
    batches = Batches({"image": numbered(40, num_held_out=10), "target_dataset": numbered(30, num_held_out=6)}, SPEC)

    pieces = [piece["target_dataset"][:, 0, 0, 0].tolist() for piece in batches.of("held_out", 6, 4)]

    assert pieces == [[24, 25, 26, 27], [28, 29]]


def test_the_next_batch_is_gathered_while_a_step_is_done(
    monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    gathered: list[str] = []
    gather = ImageDataset.gather

    def gather_told(dataset: ImageDataset, indices: Any) -> Any:
        found = gather(dataset, indices)
        gathered.append(current_thread().name)
        return found

    monkeypatch.setattr(ImageDataset, "gather", gather_told)
    batches = Batches({"image": numbered(40)}, SPEC)
    batches.at(0)

    wait_until(lambda: len(gathered) == 2)  # before anybody asks for it
    batches.at(1)
    wait_until(lambda: len(gathered) == 3)
    assert (gathered[0], {name.partition("_")[0] for name in gathered[1:]}) == ("MainThread", {"gather"})


def test_a_batch_is_that_of_its_step_whatever_was_asked_before() -> None:
    """A training goes back to a checkpoint, and a process of a team has its own rows."""
    asked = [(0, ALONE), (1, ALONE), (4, ALONE), (5, Team(1, 2)), (6, Team(1, 2)), (7, ALONE), (2, ALONE), (3, ALONE)]
    datasets = {"image": numbered(40, labels=True), "target_dataset": numbered(30)}
    batches = Batches(datasets, SPEC)

    for step, team in asked:
        batch, expected = batches.at(step, team), Batches(datasets, SPEC).at(step, team)
        assert batch.keys() == expected.keys()
        assert all(batch[name].equal(expected[name]) for name in expected)

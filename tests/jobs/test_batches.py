"""What a training reads of several datasets: as many samples of each, never in pairs."""

from contextlib import closing
from queue import Queue

import numpy as np
import pytest
import torch

from shared.errors import DatasetInvalid
from shared.specs import TranslationSpec
from worker.data.dataset import ImageDataset
from worker.engine.team import ALONE, Team
from worker.families.family import Batch
from worker.jobs.batches import Ahead, Batches

SPEC = TranslationSpec(
    family="translation", dataset="ds_" + "0" * 32, target_dataset="ds_" + "1" * 32, model="m", batch_size=8
)


def numbered(num: int, *, num_held_out: int = 0, side: int = 2, labels: bool = False) -> ImageDataset:
    """Images whose every byte is their place; the last ones are held out."""
    images = np.broadcast_to(np.arange(num, dtype=np.uint8)[:, None, None, None], (num, 1, side, side))
    split = (np.arange(num) >= num - num_held_out).astype(np.uint8)
    return ImageDataset(shards=[images], split=split, labels=np.arange(num) if labels else None, captions_path=None)


class _Noted(Ahead):
    """Tells which steps' batches were gathered."""

    def __init__(self, batches: Batches, gathered: Queue[int]) -> None:
        super().__init__(batches, ALONE, torch.device("cpu"))
        self.gathered = gathered

    def _gathered(self, step: int) -> Batch:
        self.gathered.put(step)
        return super()._gathered(step)


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


def test_a_batch_is_gathered_before_it_is_asked_for() -> None:
    batches, gathered = Batches({"image": numbered(40)}, SPEC), Queue[int]()

    with closing(_Noted(batches, gathered)) as ahead:
        ahead.at(5)

        assert [gathered.get(timeout=10), gathered.get(timeout=10)] == [5, 6]


def test_what_was_gathered_ahead_is_what_its_step_trains_on() -> None:
    batches = Batches({"image": numbered(40), "target_dataset": numbered(30)}, SPEC)

    with closing(Ahead(batches, ALONE, torch.device("cpu"))) as ahead:
        # On, back to a checkpoint, on, the same once more, and past steps that another attempt did.
        for step in (0, 1, 2, 1, 2, 3, 3, 9, 10):
            given, due = ahead.at(step), batches.at(step)
            assert all(torch.equal(given[name], due[name]) for name in due)


def test_what_cannot_be_gathered_fails_the_step_that_needs_it() -> None:
    class Torn(Batches):
        def at(self, step: int, team: Team = ALONE) -> Batch:
            if step == 2:
                raise OSError("the file ends early")
            return super().at(step, team)

    with closing(Ahead(Torn({"image": numbered(40)}, SPEC), ALONE, torch.device("cpu"))) as ahead:
        ahead.at(0)
        ahead.at(1)
        with pytest.raises(OSError, match="ends early"):
            ahead.at(2)


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

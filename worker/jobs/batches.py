"""What a training reads of its datasets, as a function of the step. Knows no network and no job."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from shared.errors import DatasetInvalid
from shared.specs.training import TrainSpec
from worker.data.dataset import ImageDataset
from worker.engine.order import BatchOrder
from worker.engine.team import ALONE, Team
from worker.families.family import Batch

Split = Literal["train", "held_out"]


class Batches:
    """The batches of one dataset, or of several side by side: of each as many samples, in an order of its own."""

    def __init__(self, datasets: Mapping[str, ImageDataset], spec: TrainSpec) -> None:
        """``datasets`` by the name that their samples have in a batch; the first one's labels come with them.

        Raises:
            DatasetInvalid: they differ in shape.
        """
        self.datasets = datasets
        self.shape, self.num_classes = self._first.shape, self._first.num_classes
        for name, dataset in datasets.items():
            if dataset.shape != self.shape:
                raise DatasetInvalid(f"{name} has samples of {list(dataset.shape)}, and {list(self.shape)} is needed")
        self.batch_size = spec.batch_size
        self.orders = {
            name: BatchOrder(len(dataset.train_indices), spec.batch_size, spec.seed, series=series)
            for series, (name, dataset) in enumerate(datasets.items())
        }
        self.steps_per_epoch = next(iter(self.orders.values())).steps_per_epoch
        """Of the first dataset."""

    @property
    def _first(self) -> ImageDataset:
        return next(iter(self.datasets.values()))

    def at(self, step: int, team: Team = ALONE) -> Batch:
        """The batch that ``step``, counted from 0, trains on; of a team, the rows that this process computes."""
        rows = team.rows(self.batch_size)
        places = {name: order.at(step)[rows.start : rows.stop] for name, order in self.orders.items()}
        return self._gathered({name: one.train_indices[places[name]] for name, one in self.datasets.items()})

    def measured(self, most: int) -> dict[Split, int]:
        """The splits that every dataset has samples in, and of how many of them all figures are: at most ``most``."""
        splits: tuple[Split, ...] = ("train", "held_out")
        lengths: dict[Split, int] = {split: num for split in splits if (num := self.num_of(split))}
        return dict.fromkeys(lengths, min([most, *lengths.values()]))

    def num_of(self, split: Split) -> int:
        """Samples of a split that each dataset has."""
        return min(len(indices_of(one, split)) for one in self.datasets.values())

    def of(self, split: Split, num_samples: int, batch_size: int) -> Iterator[Batch]:
        """The first samples of a split in order, in batches of at most ``batch_size``."""
        for start in range(0, num_samples, batch_size):
            rows = slice(start, min(start + batch_size, num_samples))
            yield self._gathered({name: indices_of(one, split)[rows] for name, one in self.datasets.items()})

    def _gathered(self, indices: Mapping[str, NDArray[np.int64]]) -> Batch:
        batch = {name: torch.from_numpy(one.gather(indices[name])) for name, one in self.datasets.items()}
        if self._first.labels is not None:
            batch["label"] = torch.from_numpy(self._first.labels[next(iter(indices.values()))])
        return batch


class Ahead:
    """The batches of a training's steps, each gathered by a thread while the step before is computed."""

    def __init__(self, batches: Batches, team: Team, device: torch.device) -> None:
        self.batches, self.team = batches, team
        # What a GPU copies while it computes must not be moved by the system meanwhile.
        self._is_pinned = device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Batch]] | None = None

    def at(self, step: int) -> Batch:
        """The batch that ``step``, counted from 0, trains on; whatever comes after it is begun with."""
        coming = self._next
        batch = coming[1] if coming and coming[0] == step else self._begin(step)
        self._next = step + 1, self._begin(step + 1)
        return batch.result()

    def close(self) -> None:
        """End the thread, when it has gathered what it is at."""
        self._thread.shutdown(cancel_futures=True)

    def _begin(self, step: int) -> Future[Batch]:
        return self._thread.submit(self._gathered, step)

    def _gathered(self, step: int) -> Batch:
        batch = self.batches.at(step, self.team)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._is_pinned else batch


def indices_of(dataset: ImageDataset, split: Split) -> NDArray[np.int64]:
    """The samples of one part of a dataset, ascending."""
    return dataset.train_indices if split == "train" else dataset.held_out_indices

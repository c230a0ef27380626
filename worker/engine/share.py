"""Which rows of a step's batch are computed here, and in what pieces. Knows no network."""

from collections.abc import Iterator
from dataclasses import dataclass

from worker.families.family import Batch


@dataclass(frozen=True)
class Share:
    """What one process computes of a step's batch."""

    batch: Batch
    """Its rows alone."""
    rows: range
    """Their places in the step's batch."""
    batch_size: int
    """Samples of the step's batch."""

    def pieces(self, most: int) -> Iterator[tuple[range, Batch]]:
        """The rows in pieces of at most ``most``, each with their places in the step's batch."""
        yield from pieces(self.batch, most, self.rows.start)

    def first(self, num: int) -> "Share":
        """Of the rows at most so many."""
        batch = {name: tensor[:num] for name, tensor in self.batch.items()}
        return Share(batch, self.rows[:num], self.batch_size)


def num_rows(batch: Batch) -> int:
    """Samples in a batch."""
    return len(next(iter(batch.values())))


def pieces(batch: Batch, most: int, first: int = 0) -> Iterator[tuple[range, Batch]]:
    """The batch in pieces of at most ``most`` samples, each with the places of its samples, counted from ``first``."""
    for start in range(0, num_rows(batch), most):
        stop = min(start + most, num_rows(batch))
        yield range(first + start, first + stop), {name: tensor[start:stop] for name, tensor in batch.items()}

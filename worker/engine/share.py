"""Which rows of a step's batch are computed here, and in what pieces. Knows no network."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from worker.families.family import Batch


@dataclass
class Share:
    """What one process computes of a step's batch."""

    batch: Batch
    """Its rows alone."""
    rows: range
    """Their places in the step's batch."""
    batch_size: int
    """Samples of the step's batch."""
    alter: Callable[[range, Batch], Batch] | None = None
    """What is still to be done to rows, which are told their places, before a network sees them; None is nothing."""

    def pieces(self, most: int) -> Iterator[tuple[range, Batch]]:
        """The rows in pieces of at most ``most``, each with their places in the step's batch.

        They are altered in such pieces, too, as that may take much more memory than they do; and once, however often
        they are asked for.
        """
        if self.alter is not None:
            altered = [self.alter(rows, piece) for rows, piece in pieces(self.batch, most, self.rows.start)]
            self.batch = {name: torch.cat([piece[name] for piece in altered]) for name in self.batch}
            self.alter = None
        yield from pieces(self.batch, most, self.rows.start)

    def first(self, num: int) -> "Share":
        """Of the rows at most so many, whatever becomes of them elsewhere."""
        batch = {name: tensor[:num] for name, tensor in self.batch.items()}
        return Share(batch, self.rows[:num], self.batch_size, self.alter)


def num_rows(batch: Batch) -> int:
    """Samples in a batch."""
    return len(next(iter(batch.values())))


def pieces(batch: Batch, most: int, first: int = 0) -> Iterator[tuple[range, Batch]]:
    """The batch in pieces of at most ``most`` samples, each with the places of its samples, counted from ``first``."""
    for start in range(0, num_rows(batch), most):
        stop = min(start + most, num_rows(batch))
        yield range(first + start, first + stop), {name: tensor[start:stop] for name, tensor in batch.items()}

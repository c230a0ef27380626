"""Measures a training on data: the losses of its averaged weights, and their figures. Knows no dataset and no job."""

from collections.abc import Iterable
from typing import Any

import torch

from shared.errors import OutOfMemory
from worker.engine.memory import is_out_of_memory, release
from worker.engine.share import num_rows, pieces
from worker.engine.training import Trainer
from worker.families.family import Batch


@torch.no_grad()
def evaluate(trainer: Trainer[Any, Any], batches: Iterable[Batch]) -> dict[str, float]:
    """Means of the losses and their figures over ``batches``, for the averaged weights; named as in training.

    The noise depends on a sample's position alone, so figures of different steps are comparable.

    Raises:
        OutOfMemory: not even one sample fits.
    """
    totals: dict[str, float] = {}
    done = 0
    for batch in batches:
        for name, total in _summed(trainer, batch, done).items():
            totals[name] = totals.get(name, 0.0) + total
        done += num_rows(batch)
    return {name: total / done for name, total in totals.items()}


def _summed(trainer: Trainer[Any, Any], batch: Batch, first: int) -> dict[str, float]:
    """Sums of the figures over the batch whose first sample has the position ``first``; in halves if need be."""
    try:
        return trainer.measure(batch, range(first, first + num_rows(batch)))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release(trainer.device)
    if num_rows(batch) == 1:
        raise OutOfMemory("not even one sample fits into memory beside the network and its optimizer")
    halves = [_summed(trainer, half, first + rows.start) for rows, half in pieces(batch, -(-num_rows(batch) // 2))]
    return {name: sum(half[name] for half in halves) for name in halves[0]}

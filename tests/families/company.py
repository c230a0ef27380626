"""Requests that share a tile: what becomes of the first of them."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from worker.engine.sampling import Line, Tile
from worker.families.family import Draw


def first_of(tile: Tile[Any], draws: Sequence[Draw[Any]], *, late: int) -> torch.Tensor:
    """The sample of the draw whose owner is 0; the last ``late`` of the others come when it is under way."""
    line: Line[Any] = Line(tile)
    early = list(draws[: len(draws) - late])
    random.Random(7).shuffle(early)
    line.add(early)
    found, coming = None, list(draws[len(draws) - late :])
    while not line.is_empty:
        for draw, sample in line.step():
            if draw.owner == 0:
                found = sample
        line.add(coming)
        coming = []
    assert found is not None
    return found

"""Requests that share a tile: what becomes of the first of them."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from worker.engine.sampling import Line, Tile
from worker.families.family import Draw


def first_of(tile: Tile[Any], draws: Sequence[Draw[Any]], *, late: int, is_last: bool = False) -> torch.Tensor:
    """The sample of the draw whose owner is 0; the last ``late`` of the others come when the tile is under way.

    ``is_last``: so does that one, after all others.
    """
    line: Line[Any] = Line(tile)
    first, *others = draws
    early, coming = others[: len(others) - late], others[len(others) - late :]
    (coming if is_last else early).append(first)
    random.Random(7).shuffle(early)
    line.add(early)
    found = None
    while not line.is_empty:
        for draw, sample in line.step():
            if draw.owner == 0:
                found = sample
        line.add(coming)
        coming = []
    assert found is not None
    return found

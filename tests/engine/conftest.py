"""Small specs and images for tests of the engine."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from shared.specs import VaeSpec
from worker.engine.numerics import exact
from worker.families.family import Batch, DataInfo

CPU = torch.device("cpu")
DATA = DataInfo(shape=(1, 12, 12))


@pytest.fixture(autouse=True)
def exact_kernels() -> Iterator[None]:
    """Executors run the engine like this."""
    with exact(1):
        yield


def small_spec(**fields: Any) -> VaeSpec:
    """A VAE small enough for milliseconds."""
    small: dict[str, Any] = {
        "steps": 8,
        "batch_size": 16,
        "hidden_dim": 32,
        "base_channels": 8,
        "latent_dim": 4,
        "warmup_steps": 2,
    }
    return VaeSpec(family="vae", dataset="ds_" + "0" * 32, model="bars", **(small | fields))


def bars() -> torch.Tensor:
    """Sixty-four images of one bright row or column each."""
    images = np.zeros((64, *DATA.shape), np.uint8)
    for index in range(64):
        place, grey = index % 12, 200 + index % 50
        if index % 2:
            images[index, 0, place] = grey
        else:
            images[index, 0, :, place] = grey
    return torch.from_numpy(images)


def batch_at(step: int) -> Batch:
    """Sixteen of the bars, other ones at each step."""
    return {"image": bars().roll(-5 * step, 0)[:16]}

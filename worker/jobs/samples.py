"""What a ``generate`` job stores: each sample, and a sheet of the first. Knows no network."""

import io
from math import ceil, sqrt
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.specs.tasks import Interpolate, Request, Traverse
from worker.families.family import Draw
from worker.jobs.loaded import LoadedModel
from worker.jobs.pictures import Pixels, decode_png, encode_png, fitted, sheet
from worker.run import Run, StoredObject

NPY: Final = "application/x-numpy-data"
"""Media type of an array."""


def publish_sample(run: Run, model: LoadedModel, draw: Draw[Request], sample: Tensor) -> StoredObject:
    """Bytes are pixels and go into a PNG with their recipe; other numbers are an array."""
    if sample.dtype == torch.uint8:
        picture = encode_png(sample.numpy(), model.recipe(draw.request) | {"index": draw.index})
        return publish_encoded(run, model, draw, picture, is_picture=True)
    array = io.BytesIO()
    np.save(array, sample.numpy(), allow_pickle=False)
    return publish_encoded(run, model, draw, array.getvalue(), is_picture=False)


def publish_encoded(
    run: Run, model: LoadedModel, draw: Draw[Request], body: bytes | Path, *, is_picture: bool
) -> StoredObject:
    name, about = f"sample-{draw.index:04d}", {"index": draw.index}
    if is_picture:
        return run.publish("sample", f"{name}.png", body, media_type="image/png", metadata=about)
    recipe = model.recipe(draw.request) | about
    return run.publish("sample", f"{name}.npy", body, media_type=NPY, metadata=recipe)


def read_sample(file: Path, name: str) -> NDArray[Any]:
    """A stored sample as it was drawn."""
    return np.ascontiguousarray(decode_png(file) if name.endswith(".png") else np.load(file, allow_pickle=False))


def publish_sheet(
    run: Run, model: LoadedModel, request: Request, images: list[Tensor], draws: list[Draw[Request]]
) -> None:
    """All samples in one picture; those of a sequence in a row, and of inputs beside them."""
    samples: Pixels = torch.stack(images).numpy()
    columns = None
    if isinstance(request, Interpolate | Traverse):
        columns = request.num_points
    elif draws[0].inputs is not None:
        # Each input stands left of what became of it.
        shape = samples.shape[1:]
        inputs = np.stack([fitted(draw.inputs["image"].numpy(), shape) for draw in draws[: len(images)] if draw.inputs])
        samples = np.stack([inputs, samples], axis=1).reshape(-1, *samples.shape[1:])
        columns = 2 * ceil(sqrt(len(inputs) / 2))
    picture = encode_png(sheet(samples, columns=columns), model.recipe(request) | {"num_samples": len(draws)})
    run.publish("sheet", "sheet.png", picture, media_type="image/png")

"""Fetches what an assignment refers to. Knows the shapes of ``Assignment.inputs``, no torch."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from shared.errors import DatasetInvalid
from shared.specs.tasks import Inpaint, MatchStyle, Stylise, WithInputs
from worker.data.dataset import ImageDataset, open_images
from worker.jobs.pictures import Pixels, decode_png
from worker.run import Run, StoredObject

BRIGHT = 128
"""Grey level from which on a pixel of a mask is to be filled."""


def stored(fields: Mapping[str, Any]) -> StoredObject:
    """The stored object among ``fields``, which may hold other things too."""
    return StoredObject(key=fields["key"], sha256=fields["sha256"], size_bytes=fields["size_bytes"])


def fetch_ahead(run: Run, *, weights: bool) -> None:
    """Download all that a generate job must read, with the ``weights`` of its model or without, so that nobody waits
    for it afterwards; raises what ``Run.fetch`` does."""
    inputs = dict(run.assignment.inputs)
    inputs.pop("resume", None)  # what can be done without it
    model = inputs.pop("model")
    for one in _objects([inputs, model["weights"] if weights else ()]):
        run.fetch(one)


def _objects(inputs: Any) -> Iterator[StoredObject]:
    match inputs:
        case {"key": _, "sha256": _, "size_bytes": _}:
            yield stored(inputs)
        case Mapping():
            yield from _objects(list(cast("Mapping[str, Any]", inputs).values()))
        case list():
            for one in cast("list[Any]", inputs):
                yield from _objects(one)
        case _:
            return


def fetch_images(run: Run, dataset: Mapping[str, Any]) -> ImageDataset:
    """Download an image dataset and map it into memory; DatasetInvalid if it is not one."""
    return open_images(fetch_files(run, dataset))


def fetch_files(run: Run, dataset: Mapping[str, Any]) -> dict[str, Path]:
    """Download a dataset: where its files are, by their names."""
    return {file["name"]: run.fetch(stored(file)) for file in dataset["files"]}


def fetch_task_inputs(run: Run, request: WithInputs, shape: tuple[int, ...]) -> list[dict[str, Pixels]]:
    """What a task on images reads, one mapping per sample: ``image`` (C, H, W) and what is for all of them, the
    ``mask`` (1, H, W) to inpaint, the ``style`` (C, H, W) to follow.

    Raises:
        DatasetInvalid: there are none, or they do not fit images of ``shape``.
    """
    images = _images(run, request)
    allowed = request.input_shapes(shape)
    if images[0].shape not in allowed or any(image.shape != images[0].shape for image in images):
        needed = " or ".join(str(list(one)) for one in allowed)
        raise DatasetInvalid(f"the inputs must all be {needed}; the first is {list(images[0].shape)}")
    for_all = _for_all(run, request, shape)
    return [{"image": image, **for_all} for image in images]


def _images(run: Run, request: WithInputs) -> Sequence[Pixels]:
    if request.images is not None:
        return [decode_png(run.fetch(stored(one))) for one in run.assignment.inputs["images"]]
    dataset = fetch_images(run, run.assignment.inputs["dataset"])
    parts = {"train": dataset.train_indices, "held_out": dataset.held_out_indices, "all": np.arange(len(dataset))}
    indices = parts[request.split][: request.num_samples]
    if not len(indices):
        raise DatasetInvalid(f"the dataset has no {request.split} samples")
    return list(dataset.gather(indices))


def _for_all(run: Run, request: WithInputs, shape: tuple[int, ...]) -> dict[str, Pixels]:
    match request:
        case Inpaint():
            return {"mask": _mask(run, request, shape)}
        case Stylise() | MatchStyle():
            return {"style": _picture(run, request, shape, index=request.style_index)}
        case _:
            return {}


def _mask(run: Run, request: Inpaint, shape: tuple[int, ...]) -> Pixels:
    """1 where the image is to be filled."""
    mask = np.zeros((1, *shape[1:]), np.uint8)
    if request.box is not None:
        left, top, right, bottom = request.box
        mask[:, top:bottom, left:right] = 1
        return mask
    return (_picture(run, request, shape).mean(0, keepdims=True) >= BRIGHT).astype(np.uint8)


def _picture(run: Run, request: WithInputs, shape: tuple[int, ...], *, index: int = 0) -> Pixels:
    """The one more picture that a request names: an artifact, or an image of a dataset."""
    inputs, name = run.assignment.inputs, request.picture
    if f"{name}_image" in inputs:
        picture = decode_png(run.fetch(stored(inputs[f"{name}_image"])))
    else:
        dataset = fetch_images(run, inputs[f"{name}_dataset"])
        if index >= len(dataset):
            raise DatasetInvalid(f"the dataset of the {name} has {len(dataset)} images, and none at {index}")
        picture = dataset.gather([index])[0]
    allowed = request.picture_shapes(shape)
    if picture.shape not in allowed:
        needed = " or ".join(str(list(one)) for one in allowed)
        raise DatasetInvalid(f"the {name} is {list(picture.shape)}, and {needed} is needed")
    return picture

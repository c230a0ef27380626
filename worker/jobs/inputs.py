"""Fetches what an assignment refers to. Knows the shapes of ``Assignment.inputs``, no torch."""

from collections.abc import Mapping
from typing import Any

from worker.data.dataset import ImageDataset, open_images
from worker.run import Run, StoredObject


def stored(fields: Mapping[str, Any]) -> StoredObject:
    """The stored object among ``fields``, which may hold other things too."""
    return StoredObject(key=fields["key"], sha256=fields["sha256"], size_bytes=fields["size_bytes"])


def fetch_images(run: Run, dataset: Mapping[str, Any]) -> ImageDataset:
    """Download an image dataset and map it into memory; DatasetInvalid if it is not one."""
    return open_images({file["name"]: run.fetch(stored(file)) for file in dataset["files"]})

"""Which uploads are accepted at the door, told by file name and content type alone.

The API refuses everything else before a job exists. What an upload really holds is found out later, from its
content, by the ingest job; this list needs neither numpy nor Pillow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shared.errors import InvalidSpec, UnsupportedMedia
from shared.specs.spec import DatasetKind

ANYTHING: Final = "application/octet-stream"
"""What clients send that do not know better; the file name decides then."""


WEIGHTS: Final = ".safetensors"
MODEL_FILES: Final = ("config.json", "scheduler_config.json", "model_index.json")
PICKLES: Final = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""Weights that would run code when they are opened."""


def is_weights(name: str) -> bool:
    """Whether a file is weights that can be read."""
    return name.lower().endswith(WEIGHTS)


def is_pickle(name: str) -> bool:
    """Whether a file is weights that are never read."""
    return name.lower().endswith(PICKLES)


def is_of_model(name: str) -> bool:
    """Whether a file belongs to a model's folder, as far as it is read."""
    return is_weights(name) or name.rpartition("/")[2] in MODEL_FILES


@dataclass(frozen=True, kw_only=True)
class UploadKind:
    """One accepted kind of file."""

    name: str
    """As it is called in messages."""
    suffixes: Sequence[str]
    media_types: frozenset[str]
    modalities: frozenset[DatasetKind]
    """What a dataset made of it can be."""


UPLOAD_KINDS: Final[Sequence[UploadKind]] = (
    UploadKind(
        name="zip archive",
        suffixes=(".zip",),
        media_types=frozenset({"application/zip", "application/x-zip-compressed", "application/x-zip"}),
        modalities=frozenset({"image", "audio", "text", "model"}),
    ),
    UploadKind(
        name="tar archive",
        suffixes=(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz"),
        media_types=frozenset(
            {
                "application/x-tar",
                "application/gzip",
                "application/x-gzip",
                "application/x-gtar",
                "application/x-compressed-tar",
                "application/x-bzip2",
                "application/x-bzip",
                "application/x-xz",
            }
        ),
        modalities=frozenset({"image", "audio", "text", "model"}),
    ),
    UploadKind(
        name="NumPy arrays",
        suffixes=(".npz",),
        media_types=frozenset({"application/zip", "application/x-npz", "application/x-numpy-data"}),
        modalities=frozenset({"image"}),
    ),
    UploadKind(
        name="picture",
        suffixes=(".png", ".jpg", ".jpeg", ".webp"),
        media_types=frozenset({"image/png", "image/jpeg", "image/webp"}),
        modalities=frozenset({"image"}),
    ),
    UploadKind(
        name="text file",
        suffixes=(".txt",),
        media_types=frozenset({"text/plain"}),
        modalities=frozenset({"text"}),
    ),
    UploadKind(
        name="JSON lines",
        suffixes=(".jsonl", ".ndjson"),
        media_types=frozenset(
            {
                "application/jsonl",
                "application/x-jsonlines",
                "application/x-ndjson",
                "application/ndjson",
                "application/json",
                "text/plain",
            }
        ),
        modalities=frozenset({"text"}),
    ),
)


def upload_kind(filename: str, content_type: str | None = None, modality: DatasetKind | None = None) -> UploadKind:
    """Return the kind of an upload.

    Raises:
        UnsupportedMedia: the name's ending is not accepted, or the content type contradicts it.
        InvalidSpec: such a file cannot become a dataset of this modality.
    """
    kind = next((kind for kind in UPLOAD_KINDS if filename.lower().endswith(tuple(kind.suffixes))), None)
    if kind is None:
        accepted = ", ".join(suffix for kind in UPLOAD_KINDS for suffix in kind.suffixes)
        raise UnsupportedMedia(f"the file's name must end in one of {accepted}", pointer="/file")
    media_type = (content_type or ANYTHING).partition(";")[0].strip().lower()
    if media_type != ANYTHING and media_type not in kind.media_types:
        accepted = ", ".join(sorted(kind.media_types | {ANYTHING}))
        raise UnsupportedMedia(f"the content type of a {kind.name} must be one of {accepted}", pointer="/file")
    if modality is not None and modality not in kind.modalities:
        accepted = " or ".join(sorted(kind.modalities))
        raise InvalidSpec(f"a {kind.name} can only become a dataset of {accepted}", pointer="/modality")
    return kind

"""Image files to a canonical dataset: one size, one number of channels.

The rules:

* Channels: grey stays grey only if every image is grey; else all become RGB. A palette counts as colour.
  What is transparent becomes white. 16-bit grey keeps its high eight bits. EXIF orientation is applied; of an
  animation the first frame is taken.
* Size: with a target resolution, every image becomes a square of it. Without one, the most common size is
  kept (of equally common ones the smallest) and the others are brought to it. To bring to a size means to cut
  out the centre in that shape and to resize it (Lanczos).
* Order: by name, so neither the archive's order nor its format changes the dataset.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from shared.errors import DatasetInvalid
from worker.data.decoding import Decoder, ImageFacts
from worker.data.labels import METADATA_NAME, by_folder, by_metadata, read_metadata
from worker.data.progress import Progress
from worker.data.rejects import BadSample, Rejects
from worker.data.spool import Entry, Spool
from worker.data.writing import MAX_CANONICAL_BYTES, Canonical, ImageWriter

IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
UNREAD_SUFFIXES: Final = (".gif", ".bmp", ".tif", ".tiff", ".svg", ".heic", ".avif", ".ico", ".ppm", ".pgm")
"""Images that we do not decode; they count as bad ones, so that nobody misses them silently."""
MAX_FILE_BYTES: Final = 64 << 20
MIN_SIDE: Final = 4
MAX_SIDE: Final = 1024

Shape = tuple[int, int, int]


def is_image(name: str, head: bytes) -> bool:
    """Whether a file is, or calls itself, an image."""
    is_webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    return (
        head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))
        or is_webp
        or name.lower().endswith((*IMAGE_SUFFIXES, *UNREAD_SUFFIXES))
    )


def is_metadata(name: str) -> bool:
    """Whether a member describes images."""
    return name.rpartition("/")[2] == METADATA_NAME


def convert_images(
    spool: Spool,
    entries: Sequence[Entry],
    folder: Path,
    *,
    resolution: int | None,
    progress: Progress,
) -> Canonical:
    """Decode images (and read what ``metadata.jsonl`` files among ``entries`` say of them).

    Raises:
        DatasetInvalid: too many images are bad, or their annotations do not fit them.
    """
    images = sorted((entry for entry in entries if not is_metadata(entry.name)), key=lambda entry: entry.name)
    metadata = sorted((entry for entry in entries if is_metadata(entry.name)), key=lambda entry: entry.name)
    described = read_metadata(spool, metadata, frozenset(entry.name for entry in images))
    rejects = Rejects(num_samples=len(images), noun="images")
    with Decoder(spool) as decoder:
        progress.phase("checking", 300)
        facts = _probe(decoder, images, rejects, progress)
        shape = choose_shape(list(facts.values()), resolution)
        progress.phase("converting", 900)
        with ImageWriter(folder, shape) as writer:
            kept = _decode(decoder, list(facts), writer, shape, rejects, progress)
            annotations = by_metadata(kept, described) if metadata else by_folder(kept)
            return writer.finish(annotations, {"rejected": rejects.as_json()})


def choose_shape(facts: Sequence[ImageFacts], resolution: int | None) -> Shape:
    """Channels, height and width that all images are brought to (see the module's first lines)."""
    channels = 1 if all(each.is_grey for each in facts) else 3
    if resolution is not None:
        height = width = resolution
    else:
        sizes = Counter((each.height, each.width) for each in facts)
        height, width = min(sizes, key=lambda size: (-sizes[size], size[0] * size[1], size))
    return check_shape(len(facts), (channels, height, width))


def check_shape(num_images: int, shape: Shape) -> Shape:
    """Return ``shape`` if a dataset may have it."""
    channels, height, width = shape
    if min(height, width) < MIN_SIDE or max(height, width) > MAX_SIDE:
        raise DatasetInvalid(
            f"the images are {height} x {width} pixels; sides from {MIN_SIDE} to {MAX_SIDE} are allowed: "
            "give a resolution to have them resized"
        )
    if num_images * channels * height * width > MAX_CANONICAL_BYTES:
        raise DatasetInvalid(
            f"{num_images} images of {height} x {width} pixels are more than {MAX_CANONICAL_BYTES >> 30} GiB; "
            "give a smaller resolution"
        )
    return shape


def _probe(
    decoder: Decoder, images: Sequence[Entry], rejects: Rejects, progress: Progress
) -> Mapping[Entry, ImageFacts]:
    facts: dict[Entry, ImageFacts] = {}
    for entry in progress.track(images):
        try:
            if entry.size > MAX_FILE_BYTES:
                raise BadSample(f"is larger than {MAX_FILE_BYTES} bytes")
            facts[entry] = decoder.probe(entry)
        except BadSample as bad:
            rejects.add(entry.name, str(bad))
    return facts


def _decode(
    decoder: Decoder,
    images: Sequence[Entry],
    writer: ImageWriter,
    shape: Shape,
    rejects: Rejects,
    progress: Progress,
) -> list[Entry]:
    kept: list[Entry] = []
    for entry in progress.track(images):
        try:
            writer.add(decoder.decode(entry, shape))
            kept.append(entry)
        except BadSample as bad:
            rejects.add(entry.name, str(bad))
    return kept

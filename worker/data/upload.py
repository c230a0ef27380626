"""Find out what an upload holds, from its content, and hand it to the right converter."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared.errors import DatasetInvalid
from shared.media import is_of_model, is_pickle, is_weights
from shared.specs.spec import DatasetKind
from worker.data.archive import head_of, is_archive_file, is_clutter, is_zip_file, read_members
from worker.data.arrays import convert_npz, is_npz
from worker.data.audio import convert_audio, is_audio
from worker.data.images import convert_images, is_image, is_metadata
from worker.data.members import Limits, shown
from worker.data.models import convert_model
from worker.data.progress import Progress
from worker.data.spool import Entry, Spool
from worker.data.text import JSONL_SUFFIXES, TEXT_SUFFIXES, convert_text
from worker.data.writing import Canonical
from worker.data.zips import zip_names

MAX_SHOWN_KINDS: Final = 8
WHAT_WE_READ: Final = (
    "a zip or tar of PNG, JPEG or WEBP images, of .wav recordings, of .txt or .jsonl files or of a model; "
    "an .npz of images; a single PNG, JPEG or WEBP image; a .txt or .jsonl file"
)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the job's spec says of the upload."""

    modality: DatasetKind | None = None
    resolution: int | None = None


def convert(path: Path, filename: str, scratch: Path, wanted: Wanted, progress: Progress) -> Canonical:
    """Turn an upload into a canonical dataset in ``scratch / "dataset"``.

    Raises:
        DatasetInvalid: it cannot be done; the message names the file and the reason.
    """
    folder = scratch / "dataset"
    folder.mkdir()
    with Spool(scratch / "spool") as spool:
        if not is_archive_file(path):
            return _convert_file(path, filename, spool, folder, wanted, progress)
        if is_zip_file(path) and is_npz(zip_names(path, Limits())):
            _expect(wanted, "image")
            return convert_npz(path, spool, folder, resolution=wanted.resolution, progress=progress)
        return _convert_archive(path, spool, folder, wanted, progress)


def _convert_archive(path: Path, spool: Spool, folder: Path, wanted: Wanted, progress: Progress) -> Canonical:
    progress.phase("reading", 200)
    sorted_members, others = _spool_members(path, spool, progress)
    modality = _modality(sorted_members, others, wanted)
    entries = sorted_members[modality]
    if modality == "image":
        return convert_images(spool, entries, folder, resolution=wanted.resolution, progress=progress)
    if wanted.resolution is not None:
        raise DatasetInvalid(f"a resolution was given, but the upload holds {modality}")
    converters: Mapping[str, Callable[..., Canonical]]
    converters = {"audio": convert_audio, "text": convert_text, "model": convert_model}
    return converters[modality](spool, entries, folder, progress=progress)


def _spool_members(
    path: Path, spool: Spool, progress: Progress
) -> tuple[Mapping[DatasetKind, list[Entry]], Counter[str]]:
    """Copy what could be a sample, or of a model; count everything else by its ending."""
    spooled: dict[DatasetKind, list[Entry]] = {"image": [], "audio": [], "text": [], "model": []}
    others: Counter[str] = Counter()
    for number, member in enumerate(read_members(path), start=1):
        modality = _kind(member.name, member.head)
        if modality is None:
            others[Path(member.name).suffix.lower()[:20] or "no ending"] += 1
            if is_pickle(member.name):
                # Of these a model's folder must have none, and nothing but their names is ever looked at.
                spooled["model"].append(spool.add(member.name, ()))
        elif not is_clutter(member.name):
            spooled[modality].append(spool.add(member.name, member.chunks()))
        # How many members a tar has is known only at its end.
        progress.report(number, number + 1000)
    return spooled, others


def _kind(name: str, head: bytes) -> DatasetKind | None:
    if is_image(name, head) or is_metadata(name):
        return "image"
    if is_audio(name, head):
        return "audio"
    if is_of_model(name):
        return "model"
    return "text" if name.lower().endswith((*TEXT_SUFFIXES, *JSONL_SUFFIXES)) else None


def _modality(members: Mapping[DatasetKind, Sequence[Entry]], others: Counter[str], wanted: Wanted) -> DatasetKind:
    """What the archive is about. Text beside anything else is taken for a note, and weights beside images or recordings
    for something that is not meant."""
    found: dict[DatasetKind, int] = {
        "image": sum(not is_metadata(entry.name) for entry in members["image"]),
        "audio": len(members["audio"]),
        "text": len(members["text"]),
        "model": sum(is_weights(entry.name) for entry in members["model"]),
    }
    if wanted.modality == "model" or (wanted.modality is not None and found[wanted.modality]):
        return wanted.modality
    if wanted.modality is not None or not any(found.values()):
        what = wanted.modality or "images, recordings or text"
        raise DatasetInvalid(f"the archive holds no {what}; {_summary(found, others)}")
    if found["image"] and found["audio"]:
        raise DatasetInvalid(f"the archive holds several kinds, say which is meant; {_summary(found, others)}")
    return next(modality for modality in ("image", "audio", "model", "text") if found[modality])


def _summary(found: Mapping[DatasetKind, int], others: Counter[str]) -> str:
    counts = [f"{count} {modality}" for modality, count in found.items() if count]
    counts += [f"{count} {ending}" for ending, count in others.most_common(MAX_SHOWN_KINDS)]
    return f"found: {', '.join(counts) or 'nothing'}"


def _convert_file(
    path: Path, filename: str, spool: Spool, folder: Path, wanted: Wanted, progress: Progress
) -> Canonical:
    head, name = head_of(path), filename.lower()
    is_picture = is_image("", head)
    if not is_picture and not name.endswith((*TEXT_SUFFIXES, *JSONL_SUFFIXES)):
        raise DatasetInvalid(f"{shown(filename)} {_looks_like(head)}; what can be read is {WHAT_WE_READ}")
    _expect(wanted, "image" if is_picture else "text")
    progress.phase("reading", 100)
    with path.open("rb") as file:
        entry = spool.add(filename, iter(lambda: file.read(1 << 20), b""))
    if is_picture:
        return convert_images(spool, [entry], folder, resolution=wanted.resolution, progress=progress)
    return convert_text(spool, [entry], folder, progress=progress)


def _expect(wanted: Wanted, found: DatasetKind) -> None:
    if wanted.modality not in (None, found):
        raise DatasetInvalid(f"the upload holds {found}, not {wanted.modality}")
    if wanted.resolution is not None and found != "image":
        raise DatasetInvalid(f"a resolution was given, but the upload holds {found}")


def _looks_like(head: bytes) -> str:
    if not head:
        return "is empty"
    return "is a single recording" if is_audio("", head) else f"is not an archive (it begins with {head[:8].hex(' ')})"

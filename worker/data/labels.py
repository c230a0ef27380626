"""Classes and captions of images: from their folders, or from ``metadata.jsonl``.

``metadata.jsonl`` follows Hugging Face's imagefolder: one object per line, ``file_name`` relative to the
file's own folder, and ``label`` (a name or a number), ``text`` (a caption), or both; other keys are ignored.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shared.errors import DatasetInvalid
from worker.data.members import safe_name, shown
from worker.data.spool import Entry, Spool
from worker.data.writing import Annotations

METADATA_NAME: Final = "metadata.jsonl"
MAX_METADATA_BYTES: Final = 256 << 20
MAX_TEXT_LENGTH: Final = 10_000


@dataclass(frozen=True, kw_only=True)
class Description:
    """One line of ``metadata.jsonl``."""

    label: str | None
    text: str | None


def by_folder(entries: Sequence[Entry]) -> Annotations:
    """Take the innermost folder as the class, if every sample has one and they are not all the same."""
    classes = [entry.folder.rpartition("/")[2] for entry in entries]
    return Annotations(labels=classes if all(classes) and len(set(classes)) > 1 else None)


def by_metadata(entries: Sequence[Entry], described: Mapping[str, Description]) -> Annotations:
    """Look each sample up by name.

    Raises:
        DatasetInvalid: some samples are described and others are not.
    """
    found = [described.get(entry.name) for entry in entries]
    labels = [each.label for each in found if each and each.label is not None]
    captions = [each.text for each in found if each and each.text is not None]
    for what, values in (("label", labels), ("text", captions)):
        if values and len(values) < len(entries):
            missing = next(
                entry for entry, each in zip(entries, found, strict=True) if not each or getattr(each, what) is None
            )
            raise DatasetInvalid(f"{METADATA_NAME} gives no {what} for {shown(missing.name)}, but does for others")
    return Annotations(labels=labels or None, captions=captions or None)


def read_metadata(spool: Spool, files: Sequence[Entry], names: frozenset[str]) -> dict[str, Description]:
    """Read all metadata files; ``names`` are the samples they may speak of.

    Raises:
        DatasetInvalid: a line cannot be read, or names a sample that is absent or was named before.
    """
    described: dict[str, Description] = {}
    for file in files:
        for where, record in _records(spool, file):
            name = _sample_name(file, record, where)
            if name not in names:
                raise DatasetInvalid(f"{where}: there is no image {shown(name)}")
            if name in described:
                raise DatasetInvalid(f"{where}: {shown(name)} is described twice")
            described[name] = Description(label=_label(record, where), text=_text(record, where))
    return described


def _records(spool: Spool, file: Entry) -> Iterator[tuple[str, dict[str, Any]]]:
    content = spool.read(file, at_most=MAX_METADATA_BYTES)
    for number, line in enumerate(content.split(b"\n"), start=1):
        where = f"{shown(file.name)} line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetInvalid(f"{where} is not JSON ({error})") from error
        if not isinstance(record, dict):
            raise DatasetInvalid(f"{where} is not a JSON object")
        yield where, record


def _sample_name(file: Entry, record: dict[str, Any], where: str) -> str:
    name = record.get("file_name")
    if not isinstance(name, str) or not name:
        raise DatasetInvalid(f"{where} has no file_name")
    return safe_name(f"{file.folder}/{name}" if file.folder else name)


def _label(record: dict[str, Any], where: str) -> str | None:
    label = record.get("label")
    if label is None or (isinstance(label, str) and label and _is_text(label)):
        return label
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < 2**63:
        return str(label)
    raise DatasetInvalid(f"{where}: label must be a name or a number from 0 up")


def _text(record: dict[str, Any], where: str) -> str | None:
    text = record.get("text")
    if text is None or (isinstance(text, str) and _is_text(text)):
        return text
    raise DatasetInvalid(f"{where}: text must be a string of at most {MAX_TEXT_LENGTH} characters")


def _is_text(value: str) -> bool:
    # JSON can spell NUL and halves of surrogate pairs, which neither UTF-8 nor SQL can hold.
    return len(value) <= MAX_TEXT_LENGTH and not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value)

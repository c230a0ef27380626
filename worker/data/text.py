"""Text to a canonical dataset of bytes: UTF-8, one document after another.

A ``.txt`` file is one document, each line ``{"text": …}`` of a ``.jsonl`` file is one. Several files come in a
zip or tar and are taken in the order of their names. If there is only one document in all, its last tenth is
held out (as nanoGPT does). A byte order mark is dropped; nothing else is changed. Text is not tolerated in
part: one bad byte refuses the upload, and the message says where it is.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import DatasetInvalid
from worker.data.dataset import TOKENS
from worker.data.members import shown
from worker.data.progress import Progress
from worker.data.spool import Entry, Spool
from worker.data.writing import HELD_OUT_SHARE, Annotations, Canonical, SequenceWriter

TEXT_SUFFIXES: Final = (".txt",)
JSONL_SUFFIXES: Final = (".jsonl", ".ndjson")
MAX_LINE_BYTES: Final = 16 << 20
CONTINUATION: Final = 0x80
"""Bytes inside a UTF-8 character look like 10xxxxxx."""


def convert_text(spool: Spool, entries: Sequence[Entry], folder: Path, *, progress: Progress) -> Canonical:
    """Write documents as a canonical dataset.

    Raises:
        DatasetInvalid: something is not UTF-8, not JSON, or holds a NUL; the message gives file, line, offset.
    """
    progress.phase("converting", 900)
    num_empty = 0
    with SequenceWriter(folder, "text", TOKENS, np.uint8) as writer:
        for document in _all_documents(spool, entries, progress):
            before = len(writer)
            writer.add(np.frombuffer(piece, dtype=np.uint8) for piece in document)
            num_empty += len(writer) == before
        info = {"num_bytes": writer.num_values, "num_empty": num_empty, "encoding": "utf-8", "vocabulary_size": 256}
        return writer.finish(Annotations(), info, cut=last_tenth)


def last_tenth(tokens: NDArray[np.uint8]) -> int | None:
    """Where the last tenth of a text begins, moved forward to the start of a character."""
    cut_at = int(len(tokens) * (1 - HELD_OUT_SHARE))
    while cut_at < len(tokens) and tokens[cut_at] & 0xC0 == CONTINUATION:
        cut_at += 1
    return cut_at if 0 < cut_at < len(tokens) else None


def _report(progress: Progress, done: int, total: int, at: int) -> None:
    progress.report(done + at, total)


def _all_documents(spool: Spool, entries: Sequence[Entry], progress: Progress) -> Iterator[Iterable[bytes]]:
    total = sum(entry.size for entry in entries)
    done = 0
    for entry in sorted(entries, key=lambda entry: entry.name):
        yield from _documents(spool, entry, partial(_report, progress, done, total))
        done += entry.size


def _documents(spool: Spool, entry: Entry, report: Callable[[int], None]) -> Iterator[Iterable[bytes]]:
    content = _checked(spool, entry, report)
    if entry.suffix in JSONL_SUFFIXES:
        yield from ([text] for text in _lines(content, entry))
    else:
        yield content


def _checked(spool: Spool, entry: Entry, report: Callable[[int], None]) -> Iterator[bytes]:
    """Stream a file as it is, and refuse it at the first byte that is not text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at, line = 0, 1
    for chunk in spool.chunks(entry):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(chunk, final=at + len(chunk) == entry.size)
        except UnicodeDecodeError as error:
            before = error.start - pending
            line += chunk.count(b"\n", 0, max(0, before))
            where = f"line {line}, byte {at + before}"
            raise DatasetInvalid(f"{shown(entry.name)} is not UTF-8: {error.reason} in {where}") from error
        _refuse_nul(chunk, entry, line, at)
        yield chunk if at else chunk.removeprefix(codecs.BOM_UTF8)
        at += len(chunk)
        line += chunk.count(b"\n")
        report(at)


def _refuse_nul(chunk: bytes, entry: Entry, line: int, at: int) -> None:
    nul = chunk.find(b"\0")
    if nul >= 0:
        line += chunk.count(b"\n", 0, nul)
        raise DatasetInvalid(f"{shown(entry.name)} has a NUL in line {line}, byte {at + nul}; is it UTF-16?")


def _lines(content: Iterable[bytes], entry: Entry) -> Iterator[bytes]:
    """The texts of a ``.jsonl`` file."""
    rest = b""
    number = 0
    for chunk in content:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            yield from _text(line, entry, number)
        if len(rest) > MAX_LINE_BYTES:
            raise DatasetInvalid(f"{shown(entry.name)} line {number + 1} is longer than {MAX_LINE_BYTES} bytes")
    yield from _text(rest, entry, number + 1)


def _text(line: bytes, entry: Entry, number: int) -> Iterator[bytes]:
    if not line.strip():
        return
    where = f"{shown(entry.name)} line {number}"
    try:
        record: Any = json.loads(line)
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DatasetInvalid(f'{where} is not an object with a "text"')
        yield text.encode()
    except (ValueError, RecursionError) as error:
        raise DatasetInvalid(f"{where} cannot be read ({type(error).__name__}: {error})") from error

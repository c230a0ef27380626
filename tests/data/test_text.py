"""Text: bytes stay as they are, documents keep their borders, and bad bytes are found."""

from pathlib import Path
from typing import Any

import pytest

from shared.errors import DatasetInvalid
from tests.data.conftest import Ingest, Ingested
from tests.data.making import tarred, zipped
from worker.data.dataset import open_text


def documents(ingested: Ingested) -> list[bytes]:
    dataset = open_text(ingested.files)
    return [dataset.sequence(index).tobytes() for index in range(len(dataset))]


def test_the_last_tenth_of_a_lone_text_is_held_out(ingest_upload: Ingest) -> None:
    ingested = ingest_upload(b"0123456789" * 3, "a.txt")

    assert documents(ingested) == [b"0123456789" * 2 + b"0123456", b"789"]
    assert open_text(ingested.files).held_out_indices.tolist() == [1]


def test_a_lone_text_is_not_cut_inside_a_character(ingest_upload: Ingest) -> None:
    assert documents(ingest_upload("aaaaaaaa€b".encode(), "a.txt")) == ["aaaaaaaa€".encode(), b"b"]


def test_a_text_of_one_character_stays_whole(ingest_upload: Ingest) -> None:
    ingested = ingest_upload("€".encode(), "a.txt")

    assert ingested.result["info"]["counts"] == {"train": 1, "held_out": 0}


def test_each_line_of_jsonl_is_a_document(ingest_upload: Ingest) -> None:
    lines = '\ufeff{"text": "one"}\n\n{"text": ""}\r\n{"text": "zw\\u00f6lf", "id": 3}'

    ingested = ingest_upload(lines.encode(), "a.jsonl")

    assert documents(ingested) == [b"one", "zwölf".encode()]
    assert ingested.result["info"]["num_empty"] == 1


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_each_file_of_an_archive_is_a_document(ingest_upload: Ingest, pack: Any) -> None:
    ingested = ingest_upload(pack({"b.txt": b"second", "a/a.txt": b"first", "c.jsonl": b'{"text": "third"}'}), "a")

    assert documents(ingested) == [b"first", b"second", b"third"]
    assert ingested.result["count"] == 3


def test_documents_may_span_the_pieces_in_which_files_are_read(ingest_upload: Ingest) -> None:
    long = "€" * 200_000

    ingested = ingest_upload(zipped({"a.txt": long.encode(), "b.jsonl": f'{{"text": "{long}"}}'.encode()}), "a.zip")

    assert documents(ingested) == [long.encode()] * 2


BAD: dict[str, tuple[str, bytes, str]] = {
    "Latin-1": ("a.txt", "eins\nzwei\ndrei vier fünf".encode("latin-1"), "'a.txt' is not UTF-8: .* line 3, byte 21"),
    "Latin-1 far inside": ("a.txt", b"x\n" * 300_000 + b"\xff", "line 300001, byte 600000"),
    "cut character": ("a.txt", "aa€".encode()[:-1], "unexpected end of data in line 1, byte 2"),
    "overlong": ("a.txt", b"a\xc0\x80", "invalid start byte in line 1, byte 1"),
    "UTF-16": ("a.txt", "a\nb".encode("utf-16-le"), "NUL in line 1, byte 1; is it UTF-16"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n{"text": ', r"'a.jsonl' line 2 cannot be read"),
    "no text": ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', "'a.jsonl' line 2 is not an object with a \"text\""),
    "number": ("a.jsonl", b'{"text": 1}', 'line 1 is not an object with a "text"'),
    "list": ("a.jsonl", b"[1]", "line 1 is not an object"),
    "deep": ("a.jsonl", b"[" * 100_000, "line 1 cannot be read"),
    "half a pair": ("a.jsonl", b'{"text": "\\ud800"}', "line 1 cannot be read"),
    "bad bytes in JSON": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "not UTF-8.*line 2, byte 24"),
    "endless line": ("a.jsonl", b'{"text": "' + b"a" * (17 << 20), "line 1 is longer than"),
    "empty": ("a.txt", b"", "no samples"),
    "only a mark": ("a.txt", b"\xef\xbb\xbf", "no samples"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_text_is_refused_and_the_place_is_named(ingest_upload: Ingest, what: str) -> None:
    name, content, message = BAD[what]

    with pytest.raises(DatasetInvalid, match=message):
        ingest_upload(content, name)


def test_real_text_is_split_as_nano_gpt_does(ingest_upload: Ingest, real_data: Path) -> None:
    text = (real_data / "tinyshakespeare.txt").read_bytes()

    train, held_out = documents(ingest_upload(text, "tinyshakespeare.txt"))

    assert len(train) == int(0.9 * len(text)) and train + held_out == text

"""Recordings: every PCM depth becomes 16-bit mono, and headers are not believed."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import DatasetInvalid
from tests.data.conftest import Ingest, Ingested
from tests.data.making import wav, zipped
from worker.data.audio import PCM_GUID, parse_wav, to_int16_mono
from worker.data.dataset import open_audio
from worker.data.rejects import BadSample

TONE = np.array([-32768, -1, 0, 1, 32767, 255, 256, 12345], dtype=np.int16)


def recordings(ingested: Ingested) -> list[list[int]]:
    dataset = open_audio(ingested.files)
    return [dataset.sequence(index).tolist() for index in range(len(dataset))]


DEPTHS: dict[str, tuple[bytes, list[int]]] = {
    "8 bits": (wav(bytes([0, 127, 128, 255]), width=1), [-32768, -256, 0, 32512]),
    "16 bits": (wav(TONE), TONE.tolist()),
    "24 bits": (wav(b"".join(b"\xab" + struct.pack("<h", value) for value in TONE), width=3), TONE.tolist()),
    "32 bits": (wav((TONE.astype("<i4") << 16).tobytes(), width=4), TONE.tolist()),
    "stereo": (wav([100, 200, -100, -201, 32767, 32767], channels=2), [150, -151, 32767]),
}


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_depth_becomes_16_bit_mono(depth: str) -> None:
    content, expected = DEPTHS[depth]

    assert to_int16_mono(parse_wav(content)).tolist() == expected


def extensible(content: bytes) -> bytes:
    """The same recording, with the longer format chunk that some tools write."""
    fmt = struct.pack("<H", 0xFFFE) + content[22:36] + struct.pack("<HHI", 22, 16, 4) + PCM_GUID
    body = (
        b"WAVE" + b"LIST" + struct.pack("<I", 3) + b"abc\0" + b"fmt " + struct.pack("<I", len(fmt)) + fmt + content[36:]
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_other_chunks_are_skipped_and_extensible_pcm_is_pcm() -> None:
    assert to_int16_mono(parse_wav(extensible(wav(TONE)))).tolist() == TONE.tolist()


def patched(at: int, layout: str, value: int) -> bytes:
    content = bytearray(wav(TONE))
    struct.pack_into(layout, content, at, value)
    return bytes(content)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "lies about its length": (lambda: patched(40, "<I", 1 << 30), "declares a chunk of 1073741824 bytes and holds 16"),
    "unknown length": (lambda: patched(40, "<I", 0xFFFFFFFF), "declares a chunk of 4294967295 bytes and holds 16"),
    "cut": (lambda: wav(TONE)[:-2], "declares a chunk of 16 bytes and holds 14"),
    "half a sample": (lambda: patched(40, "<I", 15), "middle of a sample"),
    "float": (lambda: patched(20, "<H", 3), "floating point, not PCM"),
    "mu-law": (lambda: patched(20, "<H", 7), "mu-law, not PCM"),
    "strange format": (lambda: patched(20, "<H", 999), "format 999, not PCM"),
    "no channels": (lambda: patched(22, "<H", 0), "has 0 channels"),
    "six channels": (lambda: patched(22, "<H", 6), "has 6 channels"),
    "12 bits": (lambda: patched(34, "<H", 12), "12 bits"),
    "no rate": (lambda: patched(24, "<I", 0), "at 0 Hz"),
    "wrong block": (lambda: patched(32, "<H", 4), "samples of 4 bytes for 1 channels of 16 bits"),
    "no samples": (lambda: wav([]), "holds no samples"),
    "no data": (lambda: wav(TONE)[:36], "no data chunk"),
    "MP3": (lambda: b"ID3" + bytes(100), "is not a WAV file"),
}


@pytest.mark.parametrize("what", BAD)
def test_an_odd_recording_is_refused_with_its_reason(what: str) -> None:
    make, message = BAD[what]

    with pytest.raises(BadSample, match=message):
        parse_wav(make())


def many(count: int) -> dict[str, bytes]:
    return {f"{number:03d}.wav": wav(np.roll(TONE, number)) for number in range(count)}


def test_one_bad_recording_in_a_hundred_is_left_out_by_name(ingest_upload: Ingest) -> None:
    result = ingest_upload(zipped({**many(99), "bad.wav": wav(TONE)[:-2]}), "a.zip").result

    assert result["count"] == 99
    assert result["info"]["rejected"]["files"][0]["name"] == "bad.wav"


def test_more_bad_recordings_refuse_the_upload(ingest_upload: Ingest) -> None:
    with pytest.raises(DatasetInvalid, match=r"more than 1% of 11 recordings.*'b\.mp3' is not a WAV"):
        ingest_upload(zipped({**many(10), "b.mp3": b"ID3"}), "a.zip")


def test_the_most_common_rate_is_the_datasets(ingest_upload: Ingest) -> None:
    with pytest.raises(DatasetInvalid, match=r"'odd\.wav' is at 44100 Hz, unlike the others at 8000 Hz"):
        ingest_upload(zipped({**many(10), "odd.wav": wav(TONE, rate=44_100)}), "a.zip")


CLASSES: dict[str, tuple[list[str], Any]] = {
    "folders": (["cat/1.wav", "dog/2.wav", "cat/3.wav"], ["cat", "dog"]),
    "prefixes": (["set/1_a.wav", "set/1_b.wav", "set/0_a.wav", "set/0_b.wav"], ["0", "1"]),
    "unique prefixes": (["1_a.wav", "2_a.wav", "3_a.wav"], None),
    "no prefixes": (["1.wav", "2.wav"], None),
}


@pytest.mark.parametrize("naming", CLASSES)
def test_classes_come_from_folders_or_prefixes(ingest_upload: Ingest, naming: str) -> None:
    names, classes = CLASSES[naming]

    result = ingest_upload(zipped({name: wav(TONE[: index + 2]) for index, name in enumerate(names)}), "a.zip").result

    assert result["info"]["classes"] == classes


def test_recordings_keep_their_borders(ingest_upload: Ingest) -> None:
    ingested = ingest_upload(zipped({"b.wav": wav([3, 4, 5]), "a.wav": wav([1, 2])}), "a.zip")

    assert recordings(ingested) == [[1, 2], [3, 4, 5]]
    assert ingested.result["info"]["sample_rate"] == 8000


def test_real_recordings_are_ten_digits(ingest_upload: Ingest, real_data: Path) -> None:
    result = ingest_upload(real_data / "fsdd.zip", "fsdd.zip").result

    info = result["info"]
    assert result["count"] == 3000 and info["sample_rate"] == 8000
    assert info["classes"] == list("0123456789")
    assert 240 < info["counts"]["held_out"] < 360

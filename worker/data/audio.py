"""WAV files to a canonical dataset: 16-bit mono at one sample rate, one recording after another.

Read are PCM files of 8, 16, 24 or 32 bits, mono or stereo. Stereo becomes the mean of both channels; other
depths are scaled to 16 bits by shifting. The dataset's rate is the most common one (of equally common ones the
lowest); recordings at another rate count as bad, for resampling would change them without anybody asking. The
class of a recording is its folder, or else what its name says before the first ``_``.
"""

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from worker.data.dataset import SAMPLES
from worker.data.labels import by_folder
from worker.data.progress import Progress
from worker.data.rejects import BadSample, Rejects
from worker.data.spool import Entry, Spool
from worker.data.writing import Annotations, Canonical, SequenceWriter

WAV_SUFFIXES: Final = (".wav", ".wave")
UNREAD_SUFFIXES: Final = (".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".wma")
"""Recordings that we do not decode; they count as bad ones, so that nobody misses them silently."""
MAX_FILE_BYTES: Final = 64 << 20
RATES: Final = range(1_000, 192_001)

PCM: Final = 1
EXTENSIBLE: Final = 0xFFFE
PCM_GUID: Final = b"\x01\x00\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"
FORMAT_NAMES: Final = {
    2: "ADPCM",
    3: "floating point",
    6: "A-law",
    7: "mu-law",
    0x11: "IMA ADPCM",
    0x55: "MP3",
}
DEPTHS: Final = (8, 16, 24, 32)


@dataclass(frozen=True, kw_only=True)
class Wav:
    """What a WAV header says, checked against the bytes that are there."""

    rate: int
    channels: int
    bits: int
    data: bytes


def is_audio(name: str, head: bytes) -> bool:
    """Whether a file is, or calls itself, a recording."""
    is_wav = head.startswith(b"RIFF") and head[8:12] == b"WAVE"
    return is_wav or name.lower().endswith((*WAV_SUFFIXES, *UNREAD_SUFFIXES))


def convert_audio(spool: Spool, entries: Sequence[Entry], folder: Path, *, progress: Progress) -> Canonical:
    """Write recordings as a canonical dataset.

    Raises:
        DatasetInvalid: too many recordings are bad.
    """
    recordings = sorted(entries, key=lambda entry: entry.name)
    rejects = Rejects(num_samples=len(recordings), noun="recordings")
    progress.phase("checking", 450)
    rates = _rates(spool, recordings, rejects, progress)
    counts = Counter(rates.values())
    rate = min(counts, key=lambda rate: (-counts[rate], rate))
    progress.phase("converting", 900)
    kept: list[Entry] = []
    with SequenceWriter(folder, "audio", SAMPLES, np.int16) as writer:
        for entry in progress.track(list(rates)):
            if rates[entry] == rate:
                writer.add([to_int16_mono(_read(spool, entry))])
                kept.append(entry)
            else:
                rejects.add(entry.name, f"is at {rates[entry]} Hz, unlike the others at {rate} Hz")
        info = {"sample_rate": rate, "num_values": writer.num_values, "rejected": rejects.as_json()}
        return writer.finish(_annotations(kept), info)


def _rates(spool: Spool, recordings: Sequence[Entry], rejects: Rejects, progress: Progress) -> dict[Entry, int]:
    rates: dict[Entry, int] = {}
    for entry in progress.track(recordings):
        try:
            rates[entry] = _read(spool, entry).rate
        except BadSample as bad:
            rejects.add(entry.name, str(bad))
    return rates


def parse_wav(content: bytes) -> Wav:
    """Find the format and the samples of a RIFF WAVE file.

    Raises:
        BadSample: the file is damaged, its header lies, or its encoding is not one we read.
    """
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise BadSample("is not a WAV file")
    rate = channels = bits = 0
    for kind, chunk in _chunks(content):
        if kind == b"fmt ":
            rate, channels, bits = _format(chunk)
        elif kind == b"data" and not channels:
            raise BadSample("has samples before their format")
        elif kind == b"data" and not chunk:
            raise BadSample("holds no samples")
        elif kind == b"data" and len(chunk) % (channels * bits // 8):
            raise BadSample("ends in the middle of a sample")
        elif kind == b"data":
            return Wav(rate=rate, channels=channels, bits=bits, data=chunk)
    raise BadSample("has no data chunk")


def to_int16_mono(wav: Wav) -> NDArray[np.int16]:
    """Scale to 16 bits and average the channels."""
    if wav.bits == 8:
        values = (np.frombuffer(wav.data, dtype=np.uint8).astype(np.int32) - 128) << 8
    elif wav.bits == 24:
        # The two high bytes of each little-endian triple are the 16-bit value.
        high = np.frombuffer(wav.data, dtype=np.uint8).reshape(-1, 3)[:, 1:]
        values = np.ascontiguousarray(high).view("<i2").reshape(-1).astype(np.int32)
    elif wav.bits == 16:
        values = np.frombuffer(wav.data, dtype="<i2").astype(np.int32)
    else:
        values = np.frombuffer(wav.data, dtype="<i4") >> 16
    return (values.reshape(-1, wav.channels).sum(axis=1) // wav.channels).astype(np.int16)


def _read(spool: Spool, entry: Entry) -> Wav:
    if entry.size > MAX_FILE_BYTES:
        raise BadSample(f"is larger than {MAX_FILE_BYTES} bytes")
    return parse_wav(spool.read(entry, at_most=MAX_FILE_BYTES))


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 12
    while at + 8 <= len(content):
        kind, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        held = len(content) - at - 8
        if size > held:
            raise BadSample(f"declares a chunk of {size} bytes and holds {held}")
        yield kind, content[at + 8 : at + 8 + size]
        at += 8 + size + size % 2


def _format(chunk: bytes) -> tuple[int, int, int]:
    if len(chunk) < 16:
        raise BadSample("has a damaged format chunk")
    code, channels, rate, _, block_bytes, bits = struct.unpack_from("<HHIIHH", chunk)
    if code == EXTENSIBLE and chunk[24:40] == PCM_GUID:
        code = PCM
    if code != PCM:
        raise BadSample(f"is {FORMAT_NAMES.get(code, f'encoded in format {code}')}, not PCM")
    if channels not in (1, 2) or bits not in DEPTHS or rate not in RATES:
        raise BadSample(f"has {channels} channels of {bits} bits at {rate} Hz")
    if block_bytes != channels * bits // 8:
        raise BadSample(f"has samples of {block_bytes} bytes for {channels} channels of {bits} bits")
    return rate, channels, bits


def _annotations(kept: Sequence[Entry]) -> Annotations:
    in_folders = by_folder(kept)
    if in_folders.labels is not None:
        return in_folders
    stems = [entry.name.rpartition("/")[2].rpartition(".")[0] for entry in kept]
    prefixes = [stem.partition("_")[0] if "_" in stem else "" for stem in stems]
    # Prefixes that hardly repeat are names, not classes.
    are_classes = all(prefixes) and 1 < len(set(prefixes)) <= len(prefixes) / 2
    return Annotations(labels=prefixes if are_classes else None)

"""Make the files that users upload, and those that attackers would."""

import io
import struct
import tarfile
import wave
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image

Compression = Literal["", "gz", "bz2", "xz"]


def png(pixels: Any, *, kind: str = "PNG", **options: Any) -> bytes:
    """Encode an array or a Pillow image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels, dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def greys(count: int, *, side: int = 8, seed: int = 0) -> list[bytes]:
    """Distinct grey PNG files."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, side, side), dtype=np.uint8)
    return [png(pixels) for pixels in noise]


def zipped(files: Mapping[str, bytes], **options: Any) -> bytes:
    """Make a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", options.pop("compression", zipfile.ZIP_DEFLATED), **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:
    """Make an ``.npz``."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def wav(samples: Any, *, rate: int = 8000, width: int = 2, channels: int = 1) -> bytes:
    """Make a PCM WAV of little-endian samples that are already of the wanted width."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples if isinstance(samples, bytes) else np.asarray(samples, dtype="<i2").tobytes())
    return buffer.getvalue()


def huge_png() -> bytes:
    """A small PNG whose header declares ten billion pixels."""
    content = bytearray(png(np.zeros((8, 8))))
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    content[29:33] = struct.pack(">I", crc(bytes(content[12:29])))
    return bytes(content)


def crc(content: bytes) -> int:
    """CRC-32, which PNG chunks and zip members share."""
    return zlib.crc32(content)


def tarred(files: Mapping[str, bytes], *, compression: Compression = "") -> bytes:
    """Make a tar of plain files."""
    return tar_of(((tarfile.TarInfo(name), content) for name, content in files.items()), compression=compression)


def tar_of(entries: Iterable[tuple[tarfile.TarInfo, bytes]], *, compression: Compression = "", **options: Any) -> bytes:
    """Make a tar of any entries; the size in each header is that of the content."""
    buffer = io.BytesIO()
    packed: Any = f"w:{compression}"
    with tarfile.open(fileobj=buffer, mode=packed, **options) as archive:
        for info, content in entries:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A tar entry that is not a file."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info

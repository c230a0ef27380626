"""Turn image files into pixels. Run as a script, this is the process in which that happens.

A hostile image may make a decoder loop, ask for all memory, or worse; so it gets a process of its own, with
limits on memory and processor time, no secrets in its environment and no file it may grow. It is started by
path, in isolated mode, and so imports nothing of Noisemill. Each line of standard input is a request, each
answer a line of JSON, followed by the pixels (HWC, uint8) if there are any.
"""

import io
import json
import resource
import sys
import warnings
from pathlib import Path
from typing import Any, BinaryIO, Final

# WebP registers itself when imported; to find it, Pillow would otherwise load every format it knows.
from PIL import Image, ImageOps, WebPImagePlugin  # noqa: F401

FORMATS: Final = ("PNG", "JPEG", "WEBP")
MAX_PIXELS: Final = 64_000_000
"""Width times height of the largest image that is decoded."""
MEMORY_BYTES: Final = 2 << 30
CPU_SECONDS: Final = 20
"""For one image."""

GREY_MODES: Final = ("1", "L", "LA", "I;16", "I;16B")
DEEP_GREY: Final = {"I;16": 1, "I;16B": 0}
"""Modes of 16-bit grey, and which of each pixel's two bytes is the high one."""
ORIENTED: Final = ("JPEG", "WEBP")
TRANSPOSED: Final = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""
ORIENTATION_TAG: Final = 0x0112

Request = dict[str, Any]


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Cut the centre of the wanted shape out of an image and resize it (Lanczos, antialiased)."""
    if image.size == (width, height):
        return image
    scale = min(image.width / width, image.height / height)
    crop_width, crop_height = width * scale, height * scale
    left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
    # Rounding must not push the far corner out of the image.
    box = (left, top, min(left + crop_width, image.width), min(top + crop_height, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def flatten(image: Image.Image, channels: int) -> Image.Image:
    """Convert any mode to 8-bit grey or RGB. 16 bits lose the low eight; what is transparent becomes white."""
    if image.mode in DEEP_GREY:
        high_bytes = image.tobytes()[DEEP_GREY[image.mode] :: 2]
        image = Image.frombytes("L", image.size, high_bytes)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), picture)
    return image.convert("L" if channels == 1 else "RGB")


def open_image(file: BinaryIO, request: Request) -> Image.Image:
    """Read the header of the image that a request points at; decode nothing yet."""
    file.seek(request["offset"])
    image = Image.open(io.BytesIO(file.read(request["size"])), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    return image


def probe(file: BinaryIO, request: Request) -> tuple[dict[str, Any], bytes]:
    """Height, width (as shown, so after EXIF orientation) and whether the image is grey; checks PNG checksums."""
    image = open_image(file, request)
    width, height = image.size
    if image.format in ORIENTED and image.getexif().get(ORIENTATION_TAG) in TRANSPOSED:
        width, height = height, width
    facts = {"height": height, "width": width, "is_grey": image.mode in GREY_MODES}
    # Decoding does not look at a PNG's checksums: a flipped bit would pass as a pixel.
    image.verify()
    return facts, b""


def decode(file: BinaryIO, request: Request) -> tuple[dict[str, Any], bytes]:
    """The pixels, in the wanted shape."""
    image = open_image(file, request)
    if image.format in ORIENTED:
        image = ImageOps.exif_transpose(image)
    channels, height, width = request["shape"]
    return {}, fit(flatten(image, channels), height, width).tobytes()


def _limit_process() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def _grant_time() -> None:
    """Allow so much processor time from now on; the limit counts from the start of the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _answer(file: BinaryIO, request: Request) -> tuple[dict[str, Any], bytes]:
    _grant_time()
    try:
        return (probe if request["do"] == "probe" else decode)(file, request)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return {"error": f"has too many pixels to decode safely ({error})"}, b""
    except Image.UnidentifiedImageError:
        return {"error": "is not a PNG, JPEG or WEBP image, or its header is damaged"}, b""
    except MemoryError:
        return {"error": "needs too much memory to decode"}, b""
    except Exception as error:  # noqa: BLE001 (whatever a hostile file makes a decoder raise is a fact about it)
        return {"error": f"is damaged ({type(error).__name__}: {error})"[:200]}, b""


def main() -> None:
    """Answer requests until standard input ends."""
    _limit_process()
    with Path(sys.argv[1]).open("rb") as file:
        for line in sys.stdin.buffer:
            reply, pixels = _answer(file, json.loads(line))
            sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n" + pixels)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

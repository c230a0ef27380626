"""Images in an ``.npz``: accepted layouts, the one rule for floats, and headers that lie."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from shared.errors import DatasetInvalid
from tests.data.conftest import Ingest
from tests.data.making import npz, zipped

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 10), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (6, 3, 8, 10), dtype=np.uint8)


def npy_header(shape: Any, *, descr: str = "|u1", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n".encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return zipped({"images.npy": buffer.getvalue()})


LAYOUTS: dict[str, tuple[Any, Any]] = {
    "NHW": (IMAGES, IMAGES[:, None]),
    "NHWC grey": (IMAGES[..., None], IMAGES[:, None]),
    "NCHW grey": (IMAGES[:, None], IMAGES[:, None]),
    "NCHW": (COLOUR, COLOUR),
    "NHWC": (np.ascontiguousarray(COLOUR.transpose(0, 2, 3, 1)), COLOUR),
    "Fortran order": (np.asfortranarray(IMAGES), IMAGES[:, None]),
    "float32": (IMAGES / np.float32(255), IMAGES[:, None]),
    "float64, big endian": ((IMAGES / 255).astype(">f8"), IMAGES[:, None]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_channels_first(ingest_upload: Ingest, layout: str) -> None:
    given, expected = LAYOUTS[layout]

    dataset = ingest_upload(npz(images=given), "a.npz").images()

    assert np.array_equal(dataset.gather(range(6)), expected)


@pytest.mark.parametrize(("image_key", "label_key"), [("images", "labels"), ("x", "y"), ("arr_0", "arr_1")])
def test_the_usual_names_are_known(ingest_upload: Ingest, image_key: str, label_key: str) -> None:
    labels = np.array([7, 3, 7, 3, 12, 3])

    ingested = ingest_upload(npz(**{image_key: IMAGES, label_key: labels}), "a.npz")

    dataset = ingested.images()
    assert ingested.result["info"]["classes"] == ["3", "7", "12"]
    assert dataset.labels is not None and dataset.labels.tolist() == [1, 0, 1, 0, 2, 0]


def test_an_uncompressed_npz_is_read_too(ingest_upload: Ingest) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, images=IMAGES)

    assert ingest_upload(buffer.getvalue(), "a.npz").result["count"] == 6


def test_a_blank_dataset_is_no_bomb(ingest_upload: Ingest) -> None:
    black = np.zeros((30_000, 32, 32), dtype=np.uint8)

    assert ingest_upload(npz(images=black), "a.npz").result["info"]["counts"] == {"train": 30_000, "held_out": 0}


def test_a_resolution_resizes_arrays(ingest_upload: Ingest) -> None:
    dataset = ingest_upload(npz(images=np.full((2, 20, 30, 3), 7, np.uint8)), "a.npz", resolution=8).images()

    assert dataset.shape == (3, 8, 8)
    assert np.unique(dataset.gather([0, 1])).tolist() == [7]


def floats(value: float) -> np.ndarray[Any, Any]:
    images = np.zeros((6, 8, 10), dtype=np.float32)
    images[4, 2, 2] = value
    return images


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "pickle": (pickled, "array images: object values are not allowed"),
    "structured": (
        lambda: npz(images=np.zeros((4, 8), dtype=[("a", "u1")])),
        r"array images: \[\('a', 'u1'\)\] values",
    ),
    "text": (lambda: npz(images=np.full((4, 8, 8), "a")), "array images: <U1 values are not allowed"),
    "integers": (lambda: npz(images=IMAGES.astype(np.int64)), "array images: int64 values are not allowed"),
    "not a number": (lambda: npz(images=floats(np.nan)), "array images: image 4 has the value nan"),
    "infinite": (lambda: npz(images=floats(np.inf)), "array images: image 4 has the value inf"),
    "above one": (lambda: npz(images=floats(255)), "array images: image 4 has the value 255.0; floats must be"),
    "below zero": (lambda: npz(images=floats(-1)), "array images: image 4 has the value -1.0; floats must be"),
    "header that overstates": (
        lambda: zipped({"images.npy": npy_header((1 << 40, 8, 8)) + bytes(640)}),
        "array images: the header declares 70368744177664 bytes and 640 are there",
    ),
    "header that overflows": (
        lambda: zipped({"images.npy": npy_header((1 << 32, 1 << 31, 2)) + bytes(64)}),
        "array images: the header declares 18446744073709551616 bytes and 64 are there",
    ),
    "header that understates": (
        lambda: zipped({"images.npy": npy_header((9, 8, 8)) + bytes(640)}),
        "array images: the header declares 576 bytes and 640 are there",
    ),
    "negative shape": (lambda: zipped({"images.npy": npy_header((-1, -8, 80)) + bytes(640)}), "shape .* holds nothing"),
    "shape of strings": (lambda: zipped({"images.npy": npy_header("abc")}), "not a readable .npy header"),
    "code in the header": (
        lambda: zipped({"images.npy": npy_header((12345, 1)).replace(b"(12345, 1)", b"__exit__()")}),
        "not a readable .npy header",
    ),
    "cut header": (
        lambda: zipped({"images.npy": npy_header((1, 2, 3)).replace(b", }", b",  ")}),
        "not a readable .npy header",
    ),
    "version 9": (lambda: zipped({"images.npy": npy_header((1,), version=b"\x09\x00")}), "not a readable .npy header"),
    "no header": (lambda: zipped({"images.npy": b"junk"}), "not a readable .npy header"),
    "no images": (lambda: npz(weights=IMAGES), "no array named images, x, arr_0; found: weights"),
    "two axes": (lambda: npz(images=IMAGES.reshape(6, 80)), r"array images: the shape \(6, 80\) is not"),
    "four channels": (lambda: npz(images=np.zeros((2, 8, 8, 4), np.uint8)), r"the shape \(2, 8, 8, 4\) is not"),
    "ambiguous": (lambda: npz(images=np.zeros((2, 3, 8, 3), np.uint8)), "could be channels first or last"),
    "too large": (lambda: npz(images=np.zeros((1, 2000, 8), np.uint8)), "2000 x 8 pixels.*give a resolution"),
    "few labels": (lambda: npz(images=IMAGES, labels=np.arange(5)), "array labels: int64 of shape .* 6 integers"),
    "real labels": (lambda: npz(images=IMAGES, labels=np.ones(6)), "array labels: float64 of shape .* 6 integers"),
    "negative labels": (lambda: npz(images=IMAGES, labels=-np.arange(6)), "array labels: .* not be negative"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_array_is_refused_by_name(ingest_upload: Ingest, what: str) -> None:
    make, message = BAD[what]

    with pytest.raises(DatasetInvalid, match=message):
        ingest_upload(make(), "a.npz")


def test_floats_are_rounded_to_the_nearest_level(ingest_upload: Ingest) -> None:
    images = np.full((1, 8, 8), 254.6 / 255)
    images[0, 0, :2] = np.array([0.4, 0.6]) / 255

    pixels = ingest_upload(npz(images=images), "a.npz").images().gather([0])[0, 0]

    assert [*pixels[0, :2], pixels[7, 7]] == [0, 1, 255]

"""Image files: what becomes of mixed ones, and what hostile ones cannot do."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.errors import DatasetInvalid
from tests.data.conftest import Ingest
from tests.data.making import greys, huge_png, png, tarred, zipped
from worker.data.decoding import MAX_DEATHS, Decoder, ImageFacts
from worker.data.images import choose_shape
from worker.data.rejects import BadSample
from worker.data.spool import Spool

GRADIENT = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
GREY = ImageFacts(height=8, width=8, is_grey=True)
COLOUR = ImageFacts(height=8, width=8, is_grey=False)


def hundred_and(name: str, content: bytes) -> bytes:
    """A hundred good images and one more."""
    good = {f"good-{number:03d}.png": image for number, image in enumerate(greys(100))}
    return zipped({**good, name: content})


def pid_of(decoder: Decoder) -> int:
    assert decoder.pid is not None
    return decoder.pid


def test_pixels_arrive_unchanged(ingest_upload: Ingest) -> None:
    images = greys(3)

    dataset = ingest_upload(zipped({f"{i}.png": image for i, image in enumerate(images)}), "a.zip").images()

    expected = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    assert dataset.shape == (1, 8, 8)
    assert np.array_equal(dataset.gather([2, 0, 1])[:, 0], expected[[2, 0, 1]])


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_formats_are_decoded(ingest_upload: Ingest, kind: str) -> None:
    blue = png(Image.new("RGB", (16, 16), (10, 20, 200)), kind=kind)

    dataset = ingest_upload(zipped({"a.img.png": blue}), "a.zip").images()

    assert dataset.shape == (3, 16, 16)
    assert np.abs(dataset.gather([0]).mean(axis=(0, 2, 3)) - [10, 20, 200]).max() < 5


def see_through_palette() -> Image.Image:
    image = Image.new("RGB", (8, 8), (1, 2, 3)).quantize()
    image.info["transparency"] = 0
    return image


PIXELS: dict[str, tuple[Image.Image, list[int]]] = {
    "black and white": (Image.new("1", (8, 8), 1), [255]),
    "16-bit grey": (Image.fromarray(np.full((8, 8), 0xABCD, dtype=np.uint16)), [0xAB]),
    "transparent": (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), [255, 255, 255]),
    "half transparent": (Image.new("LA", (8, 8), (0, 51)), [204]),
    "palette": (Image.new("RGB", (8, 8), (1, 2, 3)).quantize(), [1, 2, 3]),
    "transparent palette": (see_through_palette(), [255, 255, 255]),
}


@pytest.mark.parametrize("mode", PIXELS)
def test_every_mode_has_a_rule(ingest_upload: Ingest, mode: str) -> None:
    image, pixel = PIXELS[mode]

    dataset = ingest_upload(zipped({"a.png": png(image)}), "a.zip").images()

    assert dataset.gather([0])[0, :, 3, 3].tolist() == pixel


def test_grey_stays_grey_only_if_all_are_grey() -> None:
    assert choose_shape([GREY, GREY], None)[0] == 1
    assert choose_shape([GREY, COLOUR], None)[0] == 3


def test_the_most_common_size_wins() -> None:
    def of(height: int, width: int) -> ImageFacts:
        return ImageFacts(height=height, width=width, is_grey=True)

    assert choose_shape([of(8, 8), of(9, 20), of(9, 20)], None) == (1, 9, 20)
    assert choose_shape([of(40, 40), of(9, 20)], None) == (1, 9, 20)
    assert choose_shape([of(9, 20), of(9, 20)], 16) == (1, 16, 16)


@pytest.mark.parametrize("side", [3, 1025])
def test_sides_out_of_bounds_ask_for_a_resolution(side: int) -> None:
    with pytest.raises(DatasetInvalid, match=f"{side} x {side} pixels.*give a resolution"):
        choose_shape([ImageFacts(height=side, width=side, is_grey=True)], None)


def test_another_size_is_cropped_at_its_centre(ingest_upload: Ingest) -> None:
    wide = np.zeros((8, 24), dtype=np.uint8)
    wide[:, 8:16] = GRADIENT

    dataset = ingest_upload(zipped({"a.png": png(GRADIENT), "b.png": png(wide)}), "a.zip").images()

    assert np.array_equal(dataset.gather([1])[0, 0], GRADIENT)


def test_a_resolution_makes_squares_of_that_side(ingest_upload: Ingest) -> None:
    content = zipped({"a.png": png(np.full((50, 30), 77)), "b.png": png(np.full((20, 90), 78))})

    dataset = ingest_upload(content, "a.zip", resolution=16).images()

    assert dataset.shape == (1, 16, 16)
    assert np.unique(dataset.gather([0])).tolist() == [77]


def test_a_photo_is_turned_as_its_camera_was(ingest_upload: Ingest) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    photo = Image.new("L", (24, 16))
    photo.paste(255, (0, 0, 12, 16))

    dataset = ingest_upload(zipped({"a.jpg": png(photo, kind="JPEG", exif=exif)}), "a.zip").images()

    assert dataset.shape == (1, 24, 16)
    assert dataset.gather([0])[0, 0, 2, 8] > 250 and dataset.gather([0])[0, 0, 21, 8] < 5


def flipped_png() -> bytes:
    content = bytearray(png(GRADIENT))
    content[-20] ^= 1
    return bytes(content)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "cut": (lambda: png(GRADIENT)[:60], "damaged"),
    "cut JPEG": (lambda: png(np.tile(GRADIENT, (9, 9)), kind="JPEG")[:-200], "damaged"),
    "cut WEBP": (lambda: png(GRADIENT, kind="WEBP", lossless=True)[:-20], "damaged"),
    "flipped bit": (flipped_png, "damaged"),
    "changed": (lambda: png(GRADIENT).replace(b"IDAT", b"IDAT!"), "damaged"),
    "huge": (huge_png, "too many pixels"),
    "GIF": (lambda: png(GRADIENT, kind="GIF"), "is not a PNG, JPEG or WEBP image"),
    "SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a PNG, JPEG or WEBP image"),
    "empty": (lambda: b"", "is not a PNG, JPEG or WEBP image"),
}


@pytest.mark.parametrize("what", BAD)
def test_one_bad_image_in_a_hundred_is_left_out_by_name(ingest_upload: Ingest, what: str) -> None:
    make, reason = BAD[what]

    result = ingest_upload(hundred_and("bad.png", make()), "a.zip").result

    rejected = result["info"]["rejected"]
    assert result["count"] == 100
    assert rejected["count"] == 1 and rejected["files"][0]["name"] == "bad.png"
    assert reason in rejected["files"][0]["reason"]


@pytest.mark.parametrize("what", BAD)
def test_more_than_one_bad_image_in_a_hundred_refuses_the_upload(ingest_upload: Ingest, what: str) -> None:
    make, reason = BAD[what]
    good = {f"good-{number:03d}.png": image for number, image in enumerate(greys(98))}

    with pytest.raises(DatasetInvalid, match=f"more than 1% of 99 images cannot be read: 'bad.png' .*{reason}"):
        ingest_upload(zipped({**good, "bad.png": make()}), "a.zip")


def test_labels_skip_the_images_that_were_left_out(ingest_upload: Ingest) -> None:
    files = {f"{'ab'[number % 2]}/{number:03d}.png": image for number, image in enumerate(greys(120))}

    ingested = ingest_upload(zipped({**files, "a/000.png": b"bad"}), "a.zip")

    dataset = ingested.images()
    assert dataset.labels is not None and dataset.labels.tolist() == [0] * 59 + [1] * 60
    assert ingested.result["info"]["classes"] == ["a", "b"]


def test_an_image_that_kills_the_decoder_is_bad_and_the_next_one_is_decoded(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool") as spool, Decoder(spool) as decoder:
        entry = spool.add("a.png", [png(GRADIENT)])
        decoder.probe(entry)
        os.kill(pid_of(decoder), signal.SIGKILL)

        with pytest.raises(BadSample, match=r"killed it \(status -9\)"):
            decoder.decode(entry, (1, 8, 8))

        assert np.array_equal(decoder.decode(entry, (1, 8, 8))[0], GRADIENT)


def test_an_image_that_hangs_the_decoder_is_bad(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool") as spool, Decoder(spool, answer_seconds=2) as decoder:
        entry = spool.add("a.png", [png(GRADIENT)])
        decoder.probe(entry)
        os.kill(pid_of(decoder), signal.SIGSTOP)

        with pytest.raises(BadSample, match="took more than 2 s"):
            decoder.probe(entry)


def test_an_upload_that_keeps_killing_the_decoder_is_refused(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool") as spool, Decoder(spool, answer_seconds=0.001) as decoder:
        entry = spool.add("a.png", [png(GRADIENT)])
        for _ in range(MAX_DEATHS):
            with pytest.raises(BadSample):
                decoder.probe(entry)

        with pytest.raises(DatasetInvalid, match=r"'a\.png' cannot be decoded"):
            decoder.probe(entry)


def test_the_decoder_may_neither_take_all_memory_nor_all_time_nor_write(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool") as spool, Decoder(spool) as decoder:
        decoder.probe(spool.add("a.png", [png(GRADIENT)]))
        limits = Path(f"/proc/{pid_of(decoder)}/limits").read_text()
        environment = Path(f"/proc/{pid_of(decoder)}/environ").read_bytes()

    rows = {line[:26].strip(): line[26:].split()[0] for line in limits.splitlines()}
    assert rows["Max address space"] == str(2 << 30)
    assert rows["Max file size"] == "0" and int(rows["Max cpu time"]) <= 30
    assert b"NOISEMILL" not in environment and b"AWS" not in environment


def test_metadata_gives_labels_and_captions(ingest_upload: Ingest) -> None:
    lines = (
        b'{"file_name": "b.png", "label": "cat", "text": "a cat"}\n{"file_name": "a.png", "label": "dog", "text": ""}'
    )
    first, second = greys(2)

    ingested = ingest_upload(zipped({"set/metadata.jsonl": lines, "set/a.png": first, "set/b.png": second}), "a.zip")

    dataset = ingested.images()
    assert ingested.result["info"]["classes"] == ["cat", "dog"]
    assert dataset.labels is not None and dataset.labels.tolist() == [1, 0]
    assert dataset.captions == ["", "a cat"]


METADATA: dict[str, tuple[bytes, str]] = {
    "no JSON": (b'{"file_name": "a.png"}\n{', r"'metadata.jsonl' line 2 is not JSON"),
    "deep JSON": (b"[" * 100_000, "line 1 is not JSON"),
    "no object": (b"[]", "line 1 is not a JSON object"),
    "no name": (b'{"label": 1}', "line 1 has no file_name"),
    "climbing name": (b'{"file_name": "../a.png"}', "climbs out"),
    "absent image": (b'{"file_name": "b.png"}', "line 1: there is no image 'b.png'"),
    "twice": (b'{"file_name": "a.png"}\n{"file_name": "a.png"}', "line 2: 'a.png' is described twice"),
    "partly": (b'{"file_name": "a.png", "label": 3}', "gives no label for 'c.png'"),
    "bad label": (b'{"file_name": "a.png", "label": 1.5}', "line 1: label must be"),
    "NUL in label": (b'{"file_name": "a.png", "label": "\\u0000"}', "line 1: label must be"),
    "bad text": (b'{"file_name": "a.png", "text": "\\ud800"}', "line 1: text must be"),
}


@pytest.mark.parametrize("what", METADATA)
def test_metadata_that_does_not_fit_is_refused(ingest_upload: Ingest, what: str) -> None:
    lines, message = METADATA[what]
    first, second = greys(2)

    with pytest.raises(DatasetInvalid, match=message):
        ingest_upload(zipped({"a.png": first, "c.png": second, "metadata.jsonl": lines}), "a.zip")


def test_numbered_folders_are_classes_in_numerical_order(ingest_upload: Ingest) -> None:
    files = {f"set/{label}/x.png": image for label, image in zip(["10", "9", "2"], greys(3), strict=True)}

    ingested = ingest_upload(tarred(files), "a.tar")

    assert ingested.result["info"]["classes"] == ["2", "9", "10"]


def test_one_folder_is_no_class(ingest_upload: Ingest) -> None:
    files = {f"pictures/{number}.png": image for number, image in enumerate(greys(3))}

    assert ingest_upload(zipped(files), "a.zip").images().num_classes == 0


def test_what_systems_leave_in_archives_is_ignored(ingest_upload: Ingest) -> None:
    clutter = {"__MACOSX/._a.png": b"x", ".hidden/b.png": b"x", "Thumbs.db": b"x", "README.md": b"x"}

    result = ingest_upload(zipped({"a.png": greys(1)[0], **clutter}), "a.zip").result

    assert result["count"] == 1 and result["info"]["rejected"]["count"] == 0


@pytest.mark.parametrize(("filename", "kind"), [("cat.png", "PNG"), ("cat.jpg", "JPEG"), ("cat.webp", "WEBP")])
def test_a_single_picture_is_a_dataset_of_one(ingest_upload: Ingest, filename: str, kind: str) -> None:
    pixels = np.full((9, 12, 3), 200, np.uint8)

    ingested = ingest_upload(png(pixels, kind=kind), filename)

    assert ingested.result["count"] == 1
    assert ingested.images().shape == (3, 9, 12)
    assert np.abs(ingested.images().gather([0])[0].astype(int) - 200).max() < 8


def test_a_picture_that_is_none_is_refused(ingest_upload: Ingest) -> None:
    with pytest.raises(DatasetInvalid, match="cat.png"):
        ingest_upload(b"no picture at all", "cat.png")

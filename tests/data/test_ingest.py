"""The ingest job as a whole: what it finds in an upload, what it reports, and what it costs."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from shared.errors import DatasetInvalid
from tests.data.conftest import DATASET_ID, Ingest
from tests.data.making import greys, npz, png, tarred, wav, zipped
from worker.run import Stopped

PICTURES = {f"{number % 2}/{number:02d}.png": image for number, image in enumerate(greys(20))}


def test_the_result_says_what_came_of_it(ingest_upload: Ingest) -> None:
    ingested = ingest_upload(zipped(PICTURES), "a.zip")

    result = ingested.result
    assert (result["modality"], result["count"]) == ("image", 20)
    assert [file["name"] for file in result["files"]] == ["images-00000.npy", "labels.npy", "split.npy"]
    assert result["info"] == {
        "shape": [1, 8, 8],
        "num_classes": 2,
        "classes": ["0", "1"],
        "counts": {
            "train": 20 - len(ingested.images().held_out_indices),
            "held_out": len(ingested.images().held_out_indices),
        },
        "rejected": {"count": 0, "files": []},
    }
    assert (result["reproducibility"], result["fingerprint"]) == ("exact", {"pillow": version("pillow")})


@pytest.mark.parametrize("suffix", ["zip", "tar", "npz", "txt", "wav.zip"])
def test_progress_only_grows_and_ends_at_its_total(ingest_upload: Ingest, suffix: str) -> None:
    uploads = {
        "zip": zipped(PICTURES),
        "tar": tarred(PICTURES),
        "npz": npz(images=np.zeros((4, 8, 8), np.uint8)),
        "txt": b"some text",
        "wav.zip": zipped({"a.wav": wav([1, 2])}),
    }

    run = ingest_upload(uploads[suffix], f"a.{suffix}").run

    assert run.steps == sorted(run.steps) and run.steps[-1] == (1000, 1000)
    assert run.phases[0] == "fetching" and run.phases[-1] == "uploading"


def test_neither_order_nor_packing_changes_the_dataset(ingest_upload: Ingest) -> None:
    backwards = dict(reversed(PICTURES.items()))
    packings = [zipped(PICTURES), zipped(backwards, compression=0), tarred(backwards, compression="xz")]

    digests = {ingest_upload(content, "a.zip").result["digest"] for content in packings}

    assert len(digests) == 1


def test_another_pixel_class_or_caption_changes_the_digest(ingest_upload: Ingest) -> None:
    first, second = greys(2)
    uploads = [
        {"a/1.png": first, "b/2.png": second},
        {"a/1.png": first, "b/2.png": first},
        {"a/1.png": first, "c/2.png": second},
        {"a/1.png": first, "a/2.png": second},
        {"a/1.png": first, "metadata.jsonl": b'{"file_name": "a/1.png", "text": "x"}'},
        {"a/1.png": first, "metadata.jsonl": b'{"file_name": "a/1.png", "text": "y"}'},
    ]

    digests = {ingest_upload(zipped(files), "a.zip").result["digest"] for files in uploads}

    assert len(digests) == len(uploads)


def test_content_counts_and_not_the_name(ingest_upload: Ingest) -> None:
    assert ingest_upload(tarred(PICTURES, compression="gz"), "a.zip").result["count"] == 20
    assert ingest_upload(npz(images=np.zeros((4, 8, 8), np.uint8)), "a.zip").result["count"] == 4


REFUSED: dict[str, tuple[bytes, str, dict[str, object], str]] = {
    "empty zip": (zipped({}), "a.zip", {}, "holds no images, recordings or text; found: nothing"),
    "empty tar": (tarred({}), "a.tar", {}, "'a.tar' is not an archive"),
    "empty tar.gz": (tarred({}, compression="gz"), "a.tgz", {}, "holds no images, recordings or text; found: nothing"),
    "empty file": (b"", "a.zip", {}, "'a.zip' is empty"),
    "no samples": (
        zipped({"a.csv": b"1", "b.csv": b"2", "model.pt": b"3", "LICENSE": b""}),
        "a.zip",
        {},
        "found: 2 .csv, 1 .pt, 1 no ending",
    ),
    "only metadata": (zipped({"metadata.jsonl": b"{}"}), "a.zip", {}, "found: nothing"),
    "only hidden files": (zipped({"__MACOSX/a.png": png(np.zeros((8, 8)))}), "a.zip", {}, "found: nothing"),
    "both kinds": (
        zipped({"a.png": greys(1)[0], "a.wav": wav([1])}),
        "a.zip",
        {},
        "several kinds, say which is meant; found: 1 image, 1 audio",
    ),
    "other modality": (zipped(PICTURES), "a.zip", {"modality": "audio"}, "holds no audio; found: 20 image"),
    "npz for text": (npz(images=np.zeros((4, 8, 8), np.uint8)), "a.npz", {"modality": "text"}, "image, not text"),
    "txt for images": (b"text", "a.txt", {"modality": "image"}, "holds text, not image"),
    "resolution of text": (b"text", "a.txt", {"resolution": 8}, "resolution was given, but the upload holds text"),
    "resolution of sound": (zipped({"a.wav": wav([1])}), "a.zip", {"resolution": 8}, "but the upload holds audio"),
    "single recording": (wav([1]), "a.zip", {}, "'a.zip' is a single recording"),
    "junk": (b"\x80\x04junk", "a.zip", {}, "'a.zip' is not an archive .it begins with 80 04"),
    "GIFs only": (zipped({"a.gif": b"GIF89a"}), "a.zip", {}, "'a.gif' is not a PNG, JPEG or WEBP"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_a_dataset_is_refused_with_what_was_found(ingest_upload: Ingest, what: str) -> None:
    content, filename, spec, message = REFUSED[what]

    with pytest.raises(DatasetInvalid, match=message):
        ingest_upload(content, filename, **spec)


def test_the_wanted_modality_decides_between_several_kinds(ingest_upload: Ingest) -> None:
    content = zipped({"a.png": greys(1)[0], "a.wav": wav([1, 2]), "a.txt": b"text"})

    found = {
        modality: ingest_upload(content, "a.zip", modality=modality).result for modality in ("image", "audio", "text")
    }

    assert all(result["modality"] == modality for modality, result in found.items())


def test_text_beside_images_is_a_note(ingest_upload: Ingest) -> None:
    assert ingest_upload(zipped({**PICTURES, "README.txt": b"hello"}), "a.zip").result["modality"] == "image"


def test_a_hostile_upload_leaves_nothing_on_disk(
    ingest_upload: Ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    with pytest.raises(DatasetInvalid):
        ingest_upload(zipped({**PICTURES, "../../evil.png": greys(1)[0]}), "a.zip")

    assert list(scratch.iterdir()) == [] and not list(tmp_path.rglob("evil*"))


def test_a_canceled_ingestion_stops(ingest_upload: Ingest) -> None:
    with pytest.raises(Stopped):
        ingest_upload(zipped(PICTURES), "a.zip", canceled=True)


INGEST_IN_LITTLE_MEMORY = """
import json, resource, sys
from pathlib import Path
from tests.data.conftest import FolderRun
from worker.jobs.ingest import ingest
from worker.run import Assignment

private_kib = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0])
limit = private_kib * 1024 + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
folder, filename = Path(sys.argv[1]).parent, Path(sys.argv[1]).name
source = {"key": filename, "sha256": "-", "size_bytes": 0, "filename": filename}
spec = {"dataset": sys.argv[3]}
assignment = Assignment(job_id="job_1", fence=1, type="ingest", spec=spec, inputs={"source": source})
print(json.dumps(ingest(FolderRun(assignment=assignment, storage=folder / "out"))))
"""


def upload_of(kind: str, folder: Path, size_bytes: int) -> Path:
    """A large upload, stored without compression."""
    noise = np.random.default_rng(0).integers(97, 123, size_bytes, dtype=np.uint8)
    path = folder / f"large.{kind}"
    if kind == "npz":
        np.savez(path, images=noise.reshape(-1, 64, 64))
    elif kind == "txt":
        noise.tofile(path)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", noise.data)
            archive.writestr("b.txt", b"b")
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits private memory apart from mapped files")
@pytest.mark.parametrize("kind", ["npz", "txt", "zip"])
def test_memory_does_not_grow_with_the_upload(tmp_path: Path, kind: str) -> None:
    path = upload_of(kind, tmp_path, 64 << 20)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / path.name).symlink_to(path)

    done = subprocess.run(
        [sys.executable, "-c", INGEST_IN_LITTLE_MEMORY, str(path), str(40 << 20), DATASET_ID],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["count"] == {"npz": (64 << 20) // 4096, "txt": 2, "zip": 2}[kind]


def test_real_digits_are_the_same_from_arrays_and_from_pictures(ingest_upload: Ingest, real_data: Path) -> None:
    raw = gzip.decompress((real_data / "mnist-t10k-images-idx3-ubyte.gz").read_bytes())
    digits = np.frombuffer(raw, dtype=np.uint8, offset=16).reshape(-1, 28, 28)[:500]
    raw = gzip.decompress((real_data / "mnist-t10k-labels-idx1-ubyte.gz").read_bytes())
    labels = np.frombuffer(raw, dtype=np.uint8, offset=8)[:500]
    pictures = {f"{label}/{i:05d}.png": png(digit) for i, (digit, label) in enumerate(zip(digits, labels, strict=True))}

    from_arrays = ingest_upload(npz(images=digits, labels=labels), "a.npz")
    from_pictures = ingest_upload(zipped(pictures), "a.zip")

    by_class = np.argsort(labels, kind="stable")
    assert np.array_equal(from_arrays.images().gather(by_class), from_pictures.images().gather(range(500)))
    assert np.array_equal(from_arrays.images().split[by_class], from_pictures.images().split)
    assert from_arrays.result["info"]["classes"] == from_pictures.result["info"]["classes"] == list("0123456789")

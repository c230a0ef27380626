"""A folder of diffusers taken in: found wherever it lies, kept byte for byte, and refused where it could be anything
else."""

import json
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from shared.errors import DatasetInvalid
from tests.data.conftest import Ingest
from tests.data.making import greys, special, tar_of, tarred, zipped

CONFIG = {"_class_name": "UNet2DModel", "sample_size": 32}
SCHEDULER = {"_class_name": "DDPMScheduler", "beta_schedule": "linear"}
WEIGHTS = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(5, np.float16)})
FOLDER = {"config.json": json.dumps(CONFIG).encode(), "diffusion_pytorch_model.safetensors": WEIGHTS}
PIPELINE = {
    "model_index.json": json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}).encode(),
    "scheduler/scheduler_config.json": json.dumps(SCHEDULER).encode(),
    **{f"unet/{name}": content for name, content in FOLDER.items()},
}


def test_a_folder_becomes_a_dataset_of_one_model(ingest_upload: Ingest) -> None:
    ingested = ingest_upload(zipped(FOLDER), "faces.zip")

    result = ingested.result
    assert (result["modality"], result["count"]) == ("model", 1)
    assert sorted(file["name"] for file in result["files"]) == sorted(FOLDER)
    told = {"format": "diffusers", "config": CONFIG, "scheduler": None, "num_tensors": 2, "num_parameters": 11}
    assert {name: result["info"][name] for name in told} == told


def test_the_weights_are_kept_byte_for_byte(ingest_upload: Ingest) -> None:
    ingested = ingest_upload(zipped(FOLDER), "faces.zip")

    (kept,) = [file for file in ingested.result["files"] if file["name"] == "diffusion_pytorch_model.safetensors"]
    assert ingested.files[kept["name"]].read_bytes() == WEIGHTS
    assert kept["sha256"] == ingested.result["info"]["sha256"]


@pytest.mark.parametrize("within", ["", "ddpm-cifar10-32/", "a/b/"])
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_pipeline_is_found_in_any_folder(ingest_upload: Ingest, pack: Any, within: str) -> None:
    upload = pack({within + name: content for name, content in PIPELINE.items()} | {f"{within}README.txt": b"hello"})

    ingested = ingest_upload(upload, "a.zip")

    assert ingested.result["info"]["scheduler"] == SCHEDULER
    assert len(ingested.result["files"]) == 3


@pytest.mark.parametrize("within", ["", "ddpm-cifar10-32/"])
def test_a_pipeline_whose_files_lie_side_by_side_is_found(ingest_upload: Ingest, within: str) -> None:
    """As in our exports, and in the library's first ones."""
    flat = {name.rpartition("/")[2]: content for name, content in PIPELINE.items()}

    ingested = ingest_upload(zipped({within + name: content for name, content in flat.items()}), "a.zip")

    assert (ingested.result["info"]["scheduler"], len(ingested.result["files"])) == (SCHEDULER, 3)
    others = flat | {"model_index.json": b'{"unet": 1, "vqvae": 2, "scheduler": 3}'}
    with pytest.raises(DatasetInvalid, match="would be lost: 'vqvae'"):
        ingest_upload(zipped({within + name: content for name, content in others.items()}), "a.zip")


def test_the_same_model_has_the_same_digest_in_whatever_archive(ingest_upload: Ingest) -> None:
    spaced = {**FOLDER, "config.json": json.dumps(CONFIG, indent=4).encode()}

    digests = {ingest_upload(upload, "a.zip").result["digest"] for upload in (zipped(FOLDER), tarred(spaced))}

    assert len(digests) == 1


def test_weights_among_images_make_no_model_of_them(ingest_upload: Ingest) -> None:
    pictures = {f"{number}.png": content for number, content in enumerate(greys(4))}

    assert ingest_upload(zipped({**pictures, **FOLDER}), "a.zip").result["modality"] == "image"
    assert ingest_upload(zipped({**pictures, **FOLDER}), "a.zip", modality="model").result["modality"] == "model"


def header(content: Mapping[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


def config(content: bytes) -> dict[str, bytes]:
    return {**FOLDER, "config.json": content}


def weights(content: bytes) -> dict[str, bytes]:
    return {**FOLDER, "diffusion_pytorch_model.safetensors": content}


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
REFUSED: dict[str, tuple[dict[str, bytes], str]] = {
    "a pickle beside": ({**FOLDER, "diffusion_pytorch_model.bin": b""}, r"model.bin': a pickle can run code"),
    "a pickle alone": ({"config.json": b"{}", "pytorch_model.bin": b""}, r"pytorch_model.bin': a pickle can run code"),
    "a pickle in an archive, as torch saves it": (
        {**FOLDER, "model.pt": b"PK\x03\x04" + bytes(600)},
        r"model.pt': a pickle can run code",
    ),
    "a checkpoint": ({**FOLDER, "last.CKPT": b""}, r"last.CKPT': a pickle can run code"),
    "no weights": ({"config.json": b"{}"}, "0 were found: there is none"),
    "nothing of a model": ({"a.csv": b""}, "0 were found"),
    "two weights": (
        {**FOLDER, "b/diffusion_pytorch_model.safetensors": WEIGHTS},
        "2 were found: 'b/diffusion_pytorch_model.safetensors', 'diffusion_pytorch_model.safetensors'",
    ),
    "a part of weights": ({"config.json": b"{}", "model-00001.safetensors": WEIGHTS}, "weights are looked for in"),
    "no config": ({"diffusion_pytorch_model.safetensors": WEIGHTS}, "there is no config.json beside it"),
    "config elsewhere": (
        {"config.json": b"{}", "unet/diffusion_pytorch_model.safetensors": WEIGHTS},
        "there is no config.json beside it",
    ),
    "another part": (
        {**PIPELINE, "model_index.json": b'{"unet": 1, "vqvae": 2, "scheduler": 3}'},
        "parts besides a UNet and a scheduler, which would be lost: 'vqvae'",
    ),
    "no JSON": (config(b"{"), "'config.json': it is not JSON"),
    "a list": (config(b"[]"), "'config.json': it holds no JSON object"),
    "no UTF-8": (config(b'{"a": "\xff"}'), "'config.json': it is not JSON"),
    "half a character": (config(b'{"a": "\\ud800"}'), "'config.json': it is not JSON"),
    "a NUL": (config(b'{"a": "\\u0000"}'), "'config.json': .*NUL"),
    "a NUL in a name": (config(b'{"\\u0000": 1}'), "'config.json': .*NUL"),
    "no number": (config(b'{"a": NaN}'), "'config.json': it is not JSON"),
    "an infinite number": (config(b'{"a": 1e999}'), "'config.json': it is not JSON"),
    "a field twice": (config(b'{"a": 1, "a": 2}'), "a field occurs twice"),
    "deep JSON": (config(b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}"), "'config.json': it is not JSON"),
    "long JSON": (config(b'{"a": "' + b"x" * 70_000 + b'"}'), "'config.json' is larger than 65536 bytes"),
    "scheduler no JSON": ({**PIPELINE, "scheduler/scheduler_config.json": b"x"}, "scheduler_config.json': it is not"),
    "a pickle by another name": (weights(pickle.dumps([1] * 99)), "it is not safetensors"),
    "empty weights": (weights(b""), "it is not safetensors"),
    "a header that is too large": (weights((1 << 30).to_bytes(8, "little") + b"{}"), "header is larger than 4194304"),
    "a header without end": (weights((1 << 20).to_bytes(8, "little") + b"{}"), "it is not safetensors"),
    "missing bytes": (weights(WEIGHTS[:-1]), "it is not safetensors"),
    "bytes too many": (weights(WEIGHTS + b"0"), "it is not safetensors"),
    "overlapping tensors": (weights(header({"a": TENSOR, "b": TENSOR}, b"0" * 8)), "it is not safetensors"),
    "another size": (weights(header({"a": TENSOR | {"shape": [3]}}, b"0" * 8)), "it is not safetensors"),
    "another type": (weights(header({"a": TENSOR | {"dtype": "O"}}, b"0" * 8)), "it is not safetensors"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_model_is_refused_by_the_file(ingest_upload: Ingest, what: str) -> None:
    files, message = REFUSED[what]

    with pytest.raises(DatasetInvalid, match=message):
        ingest_upload(zipped(files), "a.zip", modality="model")


HOSTILE: dict[str, tuple[bytes, str]] = {
    "climbing": (zipped({**FOLDER, "../config.json": b"{}"}), "climbs out of the archive"),
    "absolute": (zipped({**FOLDER, "/etc/config.json": b"{}"}), "absolute paths are not allowed"),
    "a name twice": (zipped({**FOLDER, "./config.json": b"{}"}), "the name occurs twice"),
    "a link": (tar_of([(special("config.json", tarfile.SYMTYPE, "/etc/passwd"), b"")]), "links are not allowed"),
    "a bomb": (zipped({**FOLDER, "a/config.json": b"\0" * (64 << 20)}), "decompression bomb"),
    "truncated": (zipped(FOLDER)[:-30], "truncated or damaged"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_is_refused_whole(ingest_upload: Ingest, what: str) -> None:
    content, message = HOSTILE[what]

    with pytest.raises(DatasetInvalid, match=message):
        ingest_upload(content, "a.zip", modality="model")


def test_a_resolution_means_nothing_to_a_model(ingest_upload: Ingest) -> None:
    with pytest.raises(DatasetInvalid, match="a resolution was given, but the upload holds model"):
        ingest_upload(zipped(FOLDER), "a.zip", resolution=8)


def test_pickles_are_never_opened(ingest_upload: Ingest, tmp_path: Path) -> None:
    """Nor copied: all that is known of them is their name."""
    left = tmp_path / "ran"

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (left,)

    with pytest.raises(DatasetInvalid):
        ingest_upload(zipped({**FOLDER, "a.bin": pickle.dumps(Runs())}), "a.zip", modality="model")
    with pytest.raises(DatasetInvalid):
        ingest_upload(zipped(weights(pickle.dumps(Runs()))), "a.zip", modality="model")
    assert not left.exists()

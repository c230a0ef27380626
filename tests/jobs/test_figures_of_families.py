"""Each figure of an evaluate job, of whatever family, says of how many, how surely, in and against what."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.specs import FAMILIES as SPECS
from tests.jobs.conftest import DATASET_ID, bars
from tests.jobs.folder_run import FolderRun, put, store_array
from worker.engine.checkpoint import write_weights
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo, Origin
from worker.jobs.evaluate import evaluate
from worker.metrics.features import dct
from worker.metrics.sets import digest

MakeRun = Callable[..., FolderRun]
INFO = DataInfo(shape=(1, 12, 12), num_classes=2)
NUM = 96
HELD_OUT = np.arange(NUM) % 2
LABELS = np.arange(NUM) // 2 % 2
SMALL: Mapping[str, dict[str, Any]] = {
    "vae": {"network": "mlp", "hidden_dim": 32, "latent_dim": 4, "likelihood": "logistic"},
    "vq": {"levels": (4, 4)},
    "gan": {"network": "mlp", "hidden_dim": 16},
    "diffusion": {"network": "dit"},
    "consistency": {"init_from": "base@1"},
    "translation": {"target_dataset": "ds_" + "2" * 32},
    "style": {"style_dataset": "ds_" + "2" * 32},
}
ASKED: Mapping[str, dict[str, Any]] = {
    "diffusion": {"steps": 1, "metrics": ["mind", "diversity", "memorisation", "classes", "scores"]},
    "consistency": {"steps": 1, "metrics": ["mind", "diversity", "memorisation", "classes"]},
}
"""What keeps it short where each image takes long."""
OF_SAMPLES = {
    "frechet_distance", "kernel_distance", "mind", "precision", "recall", "density", "coverage", "diversity",
    "class_accuracy",
}  # fmt: skip
COPIES = {"nearer_to_train", "copying"}
OF_RECONSTRUCTIONS = {"reconstruction_mse", "psnr", "ssim"}
FIGURES: Mapping[str, set[str]] = {
    "vae": {"elbo", "iwae64", "bits_per_dim", "kl", "active_units"}
    | OF_SAMPLES - {"class_accuracy"}
    | COPIES
    | OF_RECONSTRUCTIONS,
    "vq": {"codebook_usage", "codebook_perplexity", "code_bits_per_dim"} | OF_SAMPLES | COPIES | OF_RECONSTRUCTIONS,
    "gan": OF_SAMPLES | COPIES,
    "diffusion": {"bits_per_dim", "mind", "diversity", "class_accuracy"} | COPIES,
    "consistency": {"mind", "diversity", "class_accuracy"} | COPIES,
    "translation": {"cycle_error"},
    "style": OF_RECONSTRUCTIONS,
}


def known(family: str) -> DataInfo:
    """What a model of the family knows of its data, and of the one that it was tuned from."""
    if family != "consistency":
        return INFO
    begun = {"family": "diffusion", "dataset": DATASET_ID, "model": "base"} | SMALL["diffusion"]
    return replace(INFO, models={"init_from": Origin(family="diffusion", spec=begun, data=INFO)})


@pytest.fixture
def measured(tmp_path: Path, evaluate_run: MakeRun) -> Callable[..., dict[str, Any]]:
    """The result of an evaluate job of an untrained model."""

    def measure(family: str, **asked: Any) -> dict[str, Any]:
        spec = {"family": family, "dataset": DATASET_ID, "model": "m"} | SMALL[family]
        path, info = tmp_path / "model.safetensors", known(family)
        write_weights(path, build(FAMILIES[family], SPECS[family].model_validate(spec), info), {})
        arrays = {"images-00000.npy": bars(NUM), "split.npy": HELD_OUT.astype(np.uint8), "labels.npy": LABELS}
        files = [store_array(tmp_path, name, array) for name, array in arrays.items()]
        data = {"id": DATASET_ID, "modality": "image", "info": INFO.as_json(), "files": files}
        weights = put(tmp_path, "weights", path.read_bytes()).as_json()
        run = evaluate_run({"info": info.as_json(), "weights": weights}, data=data, model_spec=spec, **asked)
        return evaluate(run)

    return measure


def sha256_of(*sets: np.ndarray) -> str:
    """As ``docs/metrics.md`` describes it."""
    told = hashlib.sha256()
    for images in sets:
        told.update("x".join(map(str, images.shape)).encode() + b"\n" + images.tobytes())
    return told.hexdigest()


@pytest.mark.parametrize("family", SMALL)
def test_every_figure_carries_what_it_takes_to_compare_it(
    family: str, measured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores: dict[str, Any] = FAMILIES["diffusion"].scores  # pyright: ignore[reportAssignmentType]
    monkeypatch.setitem(scores, "bits_per_dim", replace(scores["bits_per_dim"], most=2))

    result = measured(family, features="digits", **ASKED.get(family, {}))

    figures, held_out = result["figures"], bars(NUM)[HELD_OUT == 1]
    assert figures.keys() == FIGURES[family]
    for name, figure in figures.items():
        assert figure.keys() == {"value", "confidence_95", "num_samples", "features", "reference"}
        num = 2 if (family, name) == ("diffusion", "bits_per_dim") else 48
        assert figure["num_samples"] == num
        assert None not in figure["confidence_95"]
        assert figure["confidence_95"][0] <= figure["value"] <= figure["confidence_95"][1]
        assert figure["features"] == (result["features"]["digest"] if name in OF_SAMPLES else None)
        against = (bars(NUM)[HELD_OUT == 0], held_out) if name in COPIES else (held_out[:num],)
        assert figure["reference"] == sha256_of(*against)


def test_a_figure_s_reference_are_the_images_that_were_looked_at(measured: Callable[..., Any]) -> None:
    figures = measured("vae", num_samples=20, split="train", num_reference=24)["figures"]

    train = bars(NUM)[HELD_OUT == 0]
    assert figures["elbo"]["reference"] == figures["psnr"]["reference"] == sha256_of(train[:20])
    assert figures["diversity"]["reference"] == sha256_of(train[::2])
    assert (figures["elbo"]["num_samples"], figures["mind"]["features"]) == (20, dct().digest)


def test_every_score_of_every_family_is_told_of_by_its_spec() -> None:
    """Of some model on some data; what a spec tells of, its family has."""
    data = {"shape": (1, 8, 8), "num_classes": 2}
    for name, family in FAMILIES.items():
        spec = SPECS[name].model_validate({"family": name, "dataset": DATASET_ID, "model": "m"} | SMALL[name])
        info = data | {"models": {"init_from": {"spec": {}, "info": data}}}
        assert spec.scores_on(data, info) == family.scores.keys()


def test_of_one_set_the_digest_is_that_of_its_shape_and_bytes() -> None:
    images = bars(4)

    assert digest(torch.from_numpy(images)) == sha256_of(images)

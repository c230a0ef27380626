"""Evaluate jobs in features whose network is the operator's."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from shared.errors import ModelLoadFailed
from tests.jobs.folder_run import FolderRun
from tests.metrics.test_inception import weights
from worker.jobs.evaluate import evaluate
from worker.jobs.train import train
from worker.metrics import inception

MakeRun = Callable[..., FolderRun]
ASKED: dict[str, Any] = {"features": "inception", "metrics": ["mind"], "split": "train", "num_samples": 16}


def test_each_figure_names_the_operator_s_file(
    train_run: MakeRun, evaluate_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "SIDE", 75)  # the smallest that the network takes: a sixteenth of the time
    save_file(weights(), tmp_path / "inception.safetensors")
    run = evaluate_run(train(train_run(steps=2)), num_reference=16, **ASKED)
    run.feature_networks = tmp_path

    result = evaluate(run)

    digest = sha256((tmp_path / "inception.safetensors").read_bytes()).hexdigest()
    assert result["figures"]["mind"]["features"] == result["features"]["digest"] == digest
    assert result["features"]["name"] == "inception"


def test_a_worker_without_the_network_says_so_at_the_start(train_run: MakeRun, evaluate_run: MakeRun) -> None:
    run = evaluate_run(train(train_run(steps=2)), **ASKED)

    with pytest.raises(ModelLoadFailed, match="NOISEMILL_WORKER_FEATURE_NETWORKS"):
        evaluate(run)

    assert run.published == []

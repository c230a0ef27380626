"""Training that is killed and resumed, as often as it may be, is bit for bit the training that was left alone."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGKILL
from typing import Any

import numpy as np
import pytest

from shared.specs import FAMILIES as SPECS
from tests.jobs.conftest import DATASET_ID, SHAPE, bars
from tests.jobs.folder_run import store_array
from tests.jobs.origins import feature_networks, origins
from tests.jobs.variants import together, variants
from worker.families import FAMILIES
from worker.families.family import DataInfo

Attempt = Callable[..., int]


@pytest.fixture(scope="module")
def mortal() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.jobs.mortal"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


class Story:
    """A training in one or several attempts, and the journal of what they reported."""

    def __init__(self, mortal: subprocess.Popen[str], folder: Path, spec: dict[str, Any], inputs: Any) -> None:
        self.mortal, self.folder, self.spec, self.inputs = mortal, folder, spec, inputs
        self.journal = folder / "journal"
        self.fence = 0

    def attempt(self, die_at: int | None = None, *, after_checkpoint: bool = False) -> int:
        """Run the next attempt, which goes on from what the others stored; its exit status."""
        self.fence += 1
        found = [entry["checkpoint"] for entry in self.entries("checkpoint")][::-1]
        inputs = self.inputs | {"resume": sorted(found, key=lambda checkpoint: -checkpoint["step"])}
        job = {"job_id": self.folder.name, "fence": self.fence, "type": "train", "spec": self.spec, "inputs": inputs}
        order = {"assignment": job, "die_at": die_at, "after_checkpoint": after_checkpoint}
        order |= {"folder": str(self.folder.parent), "journal": str(self.journal)}
        self.mortal.stdin.write(json.dumps(order) + "\n")
        self.mortal.stdin.flush()
        return int(self.mortal.stdout.readline())

    def entries(self, kind: str) -> list[dict[str, Any]]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [entry for entry in map(json.loads, lines) if kind in entry]

    def curve(self) -> dict[int, dict[str, float]]:
        """Figures by step, the last word on each, in the order in which the steps were first done."""
        return {entry["step"]: entry["values"] for entry in self.entries("step")}

    def measured(self) -> dict[tuple[int, str], dict[str, float]]:
        return {(entry["measured"], entry["split"]): entry["values"] for entry in self.entries("measured")}

    def weights(self) -> str:
        (entry,) = self.entries("result")
        return entry["result"]["weights"]["sha256"]


@pytest.fixture
def story(mortal: subprocess.Popen[str], tmp_path: Path) -> Callable[[str, dict[str, Any]], Story]:
    """A training of sixty-four labelled images, of the name and spec given; of their negatives beside them where the
    family reads a second dataset."""
    split = (np.arange(64) % 8 == 0).astype(np.uint8)
    arrays = {"images-00000.npy": bars(64), "split.npy": split, "labels.npy": np.arange(64) % 4}
    files = [store_array(tmp_path, name, array) for name, array in arrays.items()]
    dataset = {"id": DATASET_ID, "modality": "image", "info": {"shape": SHAPE, "classes": list("abcd")}, "files": files}
    negative = store_array(tmp_path, "negatives.npy", 255 - bars(64)) | {"name": "images-00000.npy"}
    negatives = [negative, files[1]]

    def make(name: str, spec: dict[str, Any]) -> Story:
        (tmp_path / name).mkdir()
        models, further = {}, ()
        if spec["family"] in SPECS:
            data = DataInfo(shape=tuple(SHAPE), num_classes=4)
            kind = SPECS[spec["family"]].model_validate(spec)
            models = origins(tmp_path, kind, data)
            feature_networks(tmp_path / "networks", kind, data)
            further = kind.further_datasets
        read = {"dataset": dataset, "further_datasets": {field: dataset | {"files": negatives} for field in further}}
        return Story(mortal, tmp_path / name, spec, read | {"models": models})

    return make


def cases() -> list[Any]:
    """Each choice at full precision, and the default in bf16, always; the rest in the long form.

    CPUs emulate fp16, which takes minutes where there are convolutions: always for two families, to show the scaler.
    """
    marked = []
    for name, spec in variants():
        is_default = name == f"{spec['family']}-{spec['precision']}"
        always = {"fp32": True, "bf16": is_default, "fp16": is_default and spec["family"] in ("vae", "toy")}
        marks = [] if always[spec["precision"]] else [pytest.mark.long]
        marked.append(pytest.param(name, spec, id=name, marks=marks))
    return [*marked, pytest.param("together", together(), id="together")]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("name", "spec"), cases())
def test_a_training_killed_at_random_steps_is_the_training_left_alone(
    story: Callable[[str, dict[str, Any]], Story], name: str, spec: dict[str, Any]
) -> None:
    chance = random.Random(name)
    straight, broken = story("straight", spec), story("broken", spec)
    assert straight.attempt() == 0

    for step in sorted(chance.sample(range(1, spec["steps"]), 3)):
        stored = step > 2 * spec["checkpoint_every"] and chance.random() < 0.7
        assert broken.attempt(die_at=step, after_checkpoint=stored) == -SIGKILL
    assert broken.attempt() == 0

    assert broken.weights() == straight.weights()
    assert broken.curve() == straight.curve()
    assert broken.measured() == straight.measured()
    assert list(broken.curve()) == list(range(1, spec["steps"] + 1))
    assert_joined(broken)


def assert_joined(broken: Story) -> None:
    """Each attempt counts its steps one by one, from the step after a checkpoint that was stored before it."""
    stored = {0}
    for fence in range(1, broken.fence + 1):
        steps = [entry["step"] for entry in broken.entries("step") if entry["attempt"] == fence]
        assert steps == list(range(steps[0], steps[0] + len(steps)))
        assert steps[0] - 1 == max(stored)
        stored |= {entry["checkpoint"]["step"] for entry in broken.entries("checkpoint") if entry["attempt"] == fence}


def test_every_registered_family_is_killed() -> None:
    trained = {spec["family"] for _, spec in variants()}

    assert trained >= FAMILIES.keys() | SPECS.keys()

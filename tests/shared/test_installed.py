"""Families of other packages: registered by installing them, and refused when they cannot be used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import FamilyRefused
from shared.specs import FAMILIES, installed
from tests.plugin.installing import PIXEL_GAUSSIAN, REPOSITORY, install
from tests.plugin.pixel_gaussian_spec import PixelGaussianSpec


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on Python's path."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_package_brings_a_family(packages: Path) -> None:
    install(packages, PIXEL_GAUSSIAN)

    assert installed.specs(FAMILIES) == {"pixel_gaussian": PixelGaussianSpec}


def test_without_packages_there_are_ours_alone() -> None:
    assert installed.specs(FAMILIES) == {}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("vae", "tests.plugin.pixel_gaussian_spec:PixelGaussianSpec", "there is a family vae already"),
        ("other", "tests.plugin.pixel_gaussian_spec:PixelGaussianSpec", 'family must be Literal\\["other"\\]'),
        ("pixel_gaussian", "tests.plugin.installing:install", "no subclass of TrainSpec"),
        ("pixel_gaussian", "tests.plugin.nowhere:Spec", "nowhere"),
        ("toy", "tests.engine.toy:ToySpec", "there is no task walk"),
    ],
)
def test_a_family_that_cannot_be_used_is_refused_by_name(packages: Path, name: str, value: str, reason: str) -> None:
    install(packages, {"noisemill.specs": {name: value}})

    with pytest.raises(FamilyRefused, match=reason):
        installed.specs(FAMILIES)


def test_two_packages_cannot_bring_one_family(packages: Path) -> None:
    for name in ("one", "two"):
        install(packages, PIXEL_GAUSSIAN, name)

    with pytest.raises(FamilyRefused, match="there is a family pixel_gaussian already"):
        installed.specs(FAMILIES)


def python(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in which the packages of ``folder`` are installed."""
    path = {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{folder}"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=os.environ | path, capture_output=True, text=True, check=False)


def test_an_installed_spec_is_part_of_what_the_api_accepts_without_torch(tmp_path: Path) -> None:
    install(tmp_path, PIXEL_GAUSSIAN)
    program = """
import json, sys
from pydantic import TypeAdapter
from shared.wire import JobRequest
spec = {"family": "pixel_gaussian", "dataset": "ds_" + "0" * 32, "model": "m", "least_deviation": 0.5}
request = TypeAdapter(JobRequest).validate_python({"type": "train", "spec": spec})
print(json.dumps([type(request.spec).__name__, request.spec.least_deviation, "torch" in sys.modules]))
"""

    done = python(program, tmp_path)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["PixelGaussianSpec", 0.5, False]


@pytest.mark.parametrize("module", ["tests.plugin.pixel_gaussian_spec", "tests.plugin.pixel_gaussian"])
def test_a_package_s_own_modules_can_be_imported_before_ours(tmp_path: Path, module: str) -> None:
    install(tmp_path, PIXEL_GAUSSIAN)

    done = python(f"import {module}; from worker.families import FAMILIES; print(*FAMILIES)", tmp_path)

    assert "pixel_gaussian" in done.stdout, done.stderr


@pytest.mark.parametrize("group", ["noisemill.specs", "noisemill.families"])
def test_a_worker_does_not_start_with_half_a_family(tmp_path: Path, group: str) -> None:
    install(tmp_path, {group: PIXEL_GAUSSIAN[group]})

    done = python("from worker.families import FAMILIES", tmp_path)

    assert done.returncode != 0 and "FamilyRefused: pixel_gaussian" in done.stderr

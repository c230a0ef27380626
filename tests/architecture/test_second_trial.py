"""A failure that no machine is to blame for gets no second trial."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.second_trial import OPTION

REPOSITORY = Path(__file__).parents[2]
TESTS = {
    "certain": "def test_one(): assert 0",
    "polling": "import pytest\n@pytest.fixture\ndef wait_until(): ...\ndef test_one(wait_until): assert 0",
    "measuring": "import time\ndef test_one(): assert 0",
}


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cov", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(("name", "is_tried"), [("certain", False), ("polling", True), ("measuring", True)])
def test_only_what_a_machine_can_make_fail_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_tried: bool
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    (tmp_path / f"test_{name}.py").write_text(TESTS[name])
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = timed: as in pyproject.toml\n")
    first = run("-p", "tests.second_trial", folder=tmp_path)

    again = run("-p", "tests.second_trial", "--last-failed", OPTION, folder=tmp_path)

    assert first.returncode == pytest.ExitCode.TESTS_FAILED
    assert again.returncode == (pytest.ExitCode.TESTS_FAILED if is_tried else pytest.ExitCode.USAGE_ERROR)


def test_no_search_of_the_model_is_ever_tried_again() -> None:
    found = run("--collect-only", "-m", "timed", "tests/model", "tests/kernels", "tests/families", folder=REPOSITORY)

    assert found.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, found.stdout

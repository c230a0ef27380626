"""The code as data: every module of ours, parsed once."""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

REPOSITORY: Final = Path(__file__).parents[2]
PACKAGES: Final = ("api", "noisemill", "shared", "worker")


@dataclass(frozen=True)
class Module:
    """One source file."""

    path: str
    """Relative to the repository, with slashes."""
    text: str
    tree: ast.Module


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def read(path: Path) -> Module:
    text = path.read_text()
    return Module(path.relative_to(REPOSITORY).as_posix(), text, ast.parse(text))


@pytest.fixture(scope="session")
def modules() -> list[Module]:
    """What we ship."""
    return [read(path) for path in sources(*PACKAGES)]


@pytest.fixture(scope="session")
def all_modules() -> list[Module]:
    """What we ship, and what tests and measures it."""
    return [read(path) for path in sources(*PACKAGES, "bench", "tests")]

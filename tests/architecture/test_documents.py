"""Documents keep their word: what they point to exists, and what they show was seen."""

import re
from pathlib import Path

import pytest
import yaml

from tests.architecture.conftest import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
DECISIONS = sorted(REPOSITORY.glob("docs/decisions/*.md"))
FOLDERS = ("api/", "bench/", "docs/", "infra/", "noisemill/", "shared/", "tests/", "worker/")


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())

    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_is_named_exists(page: Path):
    words = re.findall(r"`([\w./-]+)`", page.read_text())
    named = [word for word in words if word.startswith(FOLDERS) and not word.endswith("/nets/")]

    assert [word for word in named if not (REPOSITORY / word).exists()] == []


PROOFS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (REPOSITORY / "docs/reliability.md").read_text())


@pytest.mark.parametrize(("path", "name"), PROOFS, ids=lambda part: part)
def test_every_proof_of_a_promise_is_there(path: str, name: str):
    assert f"def {name}(" in (REPOSITORY / path).read_text()


def test_the_readme_shows_what_was_really_seen():
    assert "<<FILL" not in (REPOSITORY / "README.md").read_text()


def test_decisions_are_numbered_without_a_gap():
    assert [int(path.name[:4]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))


@pytest.mark.parametrize("decision", DECISIONS, ids=name_of)
def test_a_decision_has_its_four_parts(decision: Path):
    parts = re.findall(r"^## (.+)$", decision.read_text(), re.MULTILINE)

    assert parts == ["Context", "Decision", "Consequences", "Alternatives"]


def test_a_commit_is_checked_with_the_commands_of_make_check():
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (REPOSITORY / "Makefile").read_text()
    for hook in hooks:
        tool = hook["entry"].split(" --")[0].replace(".venv/bin", "$(BIN)")
        assert hook["language"] == "system"
        assert tool in makefile

"""How a file looks: it says what it is for, it can be read in one sitting, it names no place of its own."""

import ast
import re
import subprocess

from tests.architecture.conftest import REPOSITORY, Module

MAX_LINES = 400
MAX_FUNCTION_LINES = 50
GENERATED = "shared/migrations/versions/"
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base_service"}

# Where somebody happened to work: true for one machine on one day.
LOCAL_WORDS = re.compile(r"(?<![\w.])/(?:home|root|Users|work)/\w", re.IGNORECASE)
HOME_OF_AN_IMAGE = ("WORKDIR /home/noisemill", "/home/noisemill")


def test_every_module_says_what_it_is_for(all_modules: list[Module]):
    silent = [module.path for module in all_modules if not ast.get_docstring(module.tree)]

    assert silent == []


def test_no_module_is_longer_than_one_can_keep_in_mind(modules: list[Module]):
    long = {module.path: lines for module in modules if (lines := module.text.count("\n")) > MAX_LINES}

    assert {path: lines for path, lines in long.items() if not path.startswith(GENERATED)} == {}


def test_no_function_is_longer_than_a_screen(modules: list[Module]):
    long = [
        f"{module.path}:{node.lineno} {node.name}"
        for module in modules
        if not module.path.startswith(GENERATED)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
    ]

    assert long == []


def test_every_module_is_named_for_what_it_holds(all_modules: list[Module]):
    nameless = [module.path for module in all_modules if NAMELESS & set(re.split(r"[/.]", module.path))]

    assert nameless == []


def test_no_file_names_the_place_it_was_written_at():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    found = []
    for name in filter(None, tracked.stdout.split("\0")):
        path = REPOSITORY / name
        if not path.is_file() or path.samefile(__file__):
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        lines = enumerate(text.splitlines(), start=1)
        found += [
            f"{name}:{number}: {line.strip()[:80]}"
            for number, line in lines
            if LOCAL_WORDS.search(line) and not any(word in line for word in HOME_OF_AN_IMAGE)
        ]

    assert found == []

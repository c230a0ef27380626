"""``docker-compose.yml`` as compose sees it: parsed, merged, and with its variables put in."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

REPOSITORY: Final = Path(__file__).parents[2]
_VARIABLE: Final = re.compile(r"\$(?:\$|\{(?P<name>\w+)(?::(?P<rule>[-?])(?P<word>[^}]*))?\})")


class VariableMissing(Exception):
    """Compose would refuse to start: a required variable is unset or empty."""


def interpolate(node: Any, variables: Mapping[str, str]) -> Any:
    """Put variables in, by the rules of the compose specification that the file uses."""
    if isinstance(node, dict):
        return {key: interpolate(value, variables) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolate(value, variables) for value in node]
    if not isinstance(node, str):
        return node

    def value(match: re.Match[str]) -> str:
        name, rule, word = match["name"], match["rule"], match["word"]
        if name is None:
            return "$"
        if variables.get(name):
            return variables[name]
        if rule == "?":
            raise VariableMissing(f"{name}: {word}")
        return word or ""

    return _VARIABLE.sub(value, node)


@pytest.fixture(scope="session")
def raw() -> dict[str, Any]:
    """The file with YAML's merges resolved, variables not yet."""
    return yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())


@pytest.fixture(scope="session")
def variables(raw: dict[str, Any]) -> dict[str, str]:
    """Every variable that has no default, with a value to recognise."""
    required = re.findall(r"\$\{(\w+):\?", json.dumps(raw))
    return {name: f"value-of-{name.lower().replace('_', '-')}" for name in required}


@pytest.fixture(scope="session")
def compose(raw: dict[str, Any], variables: dict[str, str]) -> dict[str, Any]:
    return interpolate(raw, variables)


@pytest.fixture(scope="session")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return compose["services"]

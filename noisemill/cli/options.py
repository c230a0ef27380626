"""Options that several commands share, and how their values are read."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Folder of the local stack; the nearest .noisemill, else ~/.noisemill, when left out.",
    ),
]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Show at most so many.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end, or return its id at once.")]
SetFields = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any field of the spec; may be repeated."),
]
SpecFile = Annotated[Path | None, typer.Option("--file", help="JSON file with the spec, or a whole job; - is stdin.")]
Model = Annotated[
    str | None, typer.Argument(help="name@version, name@alias, name for its newest, or the job that makes it.")
]
Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Label of the job; may be repeated.")
]
Priority = Annotated[str | None, typer.Option("--priority", help="low, normal or high.")]


def pairs(texts: Iterable[str] | None, option: str) -> dict[str, str]:
    """``["a=1"]`` as ``{"a": "1"}``."""
    found: dict[str, str] = {}
    for text in texts or ():
        key, separator, value = text.partition("=")
        if not key or not separator:
            raise typer.BadParameter(f"{text!r} is not of the form KEY=VALUE", param_hint=option)
        found[key] = value
    return found


def fields(texts: Iterable[str] | None) -> dict[str, Any]:
    """Values of ``--set``: JSON where it is JSON, else text, so that ``steps=10`` is a number."""
    return {key: _value(text) for key, text in pairs(texts, "--set").items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_json(path: Path | None) -> dict[str, Any]:
    """The object in a JSON file; empty without a file."""
    if path is None:
        return {}
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path} cannot be read as JSON: {error}", param_hint="--file") from error
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{path} must hold a JSON object", param_hint="--file")
    return content

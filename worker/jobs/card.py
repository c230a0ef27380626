"""The model card of an export: what was trained on what, how it is used, and which bytes it is made of."""

import json
from collections.abc import Mapping
from typing import Any, Final

CARD: Final = "README.md"


def model_card(
    model: Mapping[str, Any], dataset: Mapping[str, Any] | None, library: str, usage: str, files: Mapping[str, str]
) -> bytes:
    """Markdown, a function of its arguments alone.

    Args:
        model: of the assignment, as ``worker/run.py`` describes it.
        dataset: likewise, where it is known.
        library: what opens the files.
        usage: how, in Markdown.
        files: the SHA-256 of each.
    """
    ref, spec = f"{model['name']}@{model['version']}", model["spec"]
    described = {"family": model["family"], "spec": spec, "info": model["info"]}
    if dataset is not None:
        described["dataset"] = {"id": dataset["id"], "digest": dataset["digest"], "info": dataset["info"]}
    rows = [f"| `{name}` | `{sha256}` |" for name, sha256 in sorted(files.items())]
    sections = [
        f"---\nlibrary_name: {library}\ntags:\n- noisemill\n---",
        f"# {ref}",
        f"A model of the family `{model['family']}`, {_origin(model['info'])} and exported for {library}.",
        f"## Use\n\n{usage}",
        "## Training\n\nWhat was asked for (`spec`), and what is known of the data:",
        f"```json\n{json.dumps(described, indent=2, sort_keys=True)}\n```",
        f"## Files\n\nMade of the weights with the SHA-256 `{model['weights']['sha256']}`.",
        "\n".join(["| file | SHA-256 |", "|---|---|", *rows]),
    ]
    return ("\n\n".join(sections) + "\n").encode()


def _origin(info: Mapping[str, Any]) -> str:
    """How it came to be here."""
    if (source := info.get("imported")) is None:
        return "trained by Noisemill"
    return f"imported by Noisemill from files of {source['format']} (weights with the SHA-256 `{source['sha256']}`)"

"""Prints docs/configuration.md from the settings: ``python docs/configuration.py > docs/configuration.md``."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from shared.described import descriptions
from shared.settings import Section, Settings

HEAD = """# Configuration

Every setting is an environment variable `NOISEMILL_<SECTION>_<FIELD>`, read once when a process starts. A misspelt
field of a section is an error that names it. Durations are seconds (`90`, `0.5`) or ISO 8601 (`PT5M`); sizes are bytes.
`noisemill up` chooses what is required by itself; `docker-compose.yml` takes it from `.env`.

This page is generated from `shared/settings.py`; a test compares the two.
"""

FOOT = """
## The client

| variable | meaning |
|---|---|
| `NOISEMILL_URL` | Address of the server; found in a local stack's `stack.json` when left out. |
| `NOISEMILL_API_KEY` | Key to sign requests with; the same. |

## Read by others

| variable | read by | meaning |
|---|---|---|
| `REMAP_SIGTERM=SIGQUIT` | Celery | Needed in containers: SIGTERM then hands the job back instead of finishing it. |
| `FLOWER_BASIC_AUTH` | Flower | `user:password`. Flower is never started without it. |
| `PIP_EXTRA_INDEX_URL` | `make` | Where pip also looks: PyTorch's CPU index spares 3 GB without a GPU. |
"""


def type_of(field: FieldInfo) -> str:
    """A word a reader knows."""
    kinds: list[Any] = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
    if get_origin(field.annotation) is Literal:
        return " or ".join(f"`{kind}`" for kind in kinds)
    kinds = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds]
    names = {SecretStr: "secret", timedelta: "duration", bool: "yes or no", str: "text", int: "number", float: "number"}
    return names.get(kinds[0]) or str(kinds[0].__name__).lower()


def default_of(field: FieldInfo) -> str:
    value: Any = field.default
    if field.is_required():
        return "**required**"
    if isinstance(value, timedelta):
        return f"`{value.total_seconds():.10g}`"
    return "" if value is None or value == "" else f"`{value}`"


def section_lines(name: str, section: type[Section]) -> Iterator[str]:
    yield f"\n## {name.capitalize() if len(name) > 3 else name.upper()}: {(section.__doc__ or '').strip()}\n"
    yield "| variable | type | default | meaning |"
    yield "|---|---|---|---|"
    told = descriptions(section)
    for field_name, field in section.model_fields.items():
        variable = f"`NOISEMILL_{name}_{field_name}`".upper()
        meaning = " ".join(told.get(field_name, "").split()).replace("``", "`")
        yield f"| {variable} | {type_of(field)} | {default_of(field)} | {meaning} |"


def render() -> str:
    """The whole page."""
    lines = [HEAD.rstrip()]
    for name, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            lines += section_lines(name, field.annotation)
    return "\n".join(lines) + "\n" + FOOT


if __name__ == "__main__":
    print(render(), end="")

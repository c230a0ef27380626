"""``noisemill models``: what has been trained."""

from itertools import islice
from typing import Annotated

import typer

from noisemill.cli.options import AsJson, Limit
from noisemill.client import Client
from noisemill.terminal import say, show_fields, show_json, show_table, size
from shared.wire import ModelVersionView

app = typer.Typer(help="List and show models.", no_args_is_help=True)


@app.command("list")
def list_models(limit: Limit = 20, as_json: AsJson = False) -> None:
    """List models and their newest versions."""
    with Client() as client:
        found = list(islice(client.models(), limit))
    if as_json:
        show_json(found)
    elif not found:
        say("No models. Train one with `noisemill train`.")
    else:
        rows = [
            (
                item.name,
                item.latest,
                item.latest_version and item.latest_version.family,
                ", ".join(f"{name}: {version}" for name, version in item.aliases.items()),
                item.created_at,
            )
            for item in found
        ]
        show_table(("model", "latest", "family", "aliases", "created"), rows)


@app.command("show")
def show_model(
    ref: Annotated[str, typer.Argument(metavar="MODEL", help="name@version, name@alias, or name for its newest.")],
    as_json: AsJson = False,
) -> None:
    """Show a version of a model."""
    with Client() as client:
        version = client.model_version(ref)
    if as_json:
        show_json(version)
    else:
        show_fields(_fields(version))


def _fields(version: ModelVersionView) -> dict[str, object]:
    return {
        "model": version.ref,
        "family": version.family,
        "tasks": ", ".join(version.tasks),
        "metrics": version.metrics,
        "size": size(version.size_bytes),
        "weights sha256": version.weights_sha256,
        "dataset": version.dataset_id,
        "trained by": version.job_id,
        "created": version.created_at,
        "spec": version.spec,
    }

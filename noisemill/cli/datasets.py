"""``noisemill datasets``: what models learn from."""

from itertools import islice
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from noisemill.cli.options import AsJson, Limit
from noisemill.cli.watching import watch
from noisemill.client import Client
from noisemill.terminal import TransferProgress, say, show, show_fields, show_json, show_table
from shared.wire import DatasetView

app = typer.Typer(help="Add, list and show datasets.", no_args_is_help=True)


@app.command("add")
def add(  # noqa: PLR0917 - a parameter is an option
    path: Annotated[
        Path,
        typer.Argument(help="Zip or tar of images, .npz, one image, .txt, .jsonl, zip of .wav or a model, folder."),
    ],
    name: Annotated[str | None, typer.Option("--name", help="What to call it; the file's name when left out.")] = None,
    modality: Annotated[
        str | None, typer.Option("--modality", help="image, text, audio or model; found out when left out.")
    ] = None,
    resolution: Annotated[int | None, typer.Option("--resolution", help="Side length of the images.")] = None,
    direct: Annotated[
        bool | None,
        typer.Option("--direct/--through-api", help="Straight to storage, or through the API; by size when left out."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when the dataset is ready.")] = True,
    as_json: AsJson = False,
) -> None:
    """Upload a dataset."""
    total = path.stat().st_size if path.is_file() else 0
    with Client() as client:
        with TransferProgress(path.name, total) as transfer:
            dataset = client.upload_dataset(
                path,
                name,
                modality=cast(Any, modality),
                resolution=resolution,
                direct=direct,
                on_bytes=transfer.on_bytes,
            )
        say(f"Uploaded {dataset.id}.")
        if wait and dataset.job_id:
            watch(client, client.job(dataset.job_id))
            dataset = client.dataset(dataset.id)
    if as_json:
        show_json(dataset)
    else:
        show(dataset.id)


@app.command("list")
def list_datasets(limit: Limit = 20, as_json: AsJson = False) -> None:
    """List datasets, newest first."""
    with Client() as client:
        found = list(islice(client.datasets(), limit))
    if as_json:
        show_json(found)
    elif not found:
        say("No datasets. Add one with `noisemill datasets add PATH`.")
    else:
        rows = [(item.id, item.name, item.state, item.modality, item.count, item.created_at) for item in found]
        show_table(("dataset", "name", "state", "modality", "samples", "created"), rows)


@app.command("show")
def show_dataset(
    dataset_id: Annotated[str, typer.Argument(metavar="DATASET", help="Id of the dataset.")],
    as_json: AsJson = False,
) -> None:
    """Show a dataset."""
    with Client() as client:
        dataset = client.dataset(dataset_id)
    if as_json:
        show_json(dataset)
    else:
        show_fields(_fields(dataset))


def _fields(dataset: DatasetView) -> dict[str, object]:
    return {
        "dataset": dataset.id,
        "name": dataset.name,
        "state": dataset.state,
        "error": dataset.error,
        "modality": dataset.modality,
        "samples": dataset.count,
        "details": dataset.info,
        "digest": dataset.digest,
        "ingested by": dataset.job_id,
        "created": dataset.created_at,
    }

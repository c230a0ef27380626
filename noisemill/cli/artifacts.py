"""``noisemill artifacts``: the bytes that jobs made."""

from pathlib import Path
from typing import Annotated

import typer

from noisemill.cli.options import AsJson
from noisemill.client import Client
from noisemill.downloads import target
from noisemill.errors import InvalidInput
from noisemill.terminal import TransferProgress, say, show, show_json, show_table, size

app = typer.Typer(help="List and download what jobs made.", no_args_is_help=True)


@app.command("list")
def list_artifacts(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")], as_json: AsJson = False
) -> None:
    """List the artifacts of a job."""
    with Client() as client:
        found = client.artifacts(job_id)
    if as_json:
        show_json(found)
    elif not found:
        say(f"{job_id} has no artifacts yet.")
    else:
        rows = [(item.id, item.kind, item.name, size(item.size_bytes), item.created_at) for item in found]
        show_table(("artifact", "kind", "name", "size", "created"), rows)


@app.command("get")
def get(
    what: Annotated[
        str,
        typer.Argument(metavar="ARTIFACT|JOB", help="Id of an artifact, or of a job for all of its artifacts."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File or folder to write to; the current folder when left out."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download an artifact, or all of a job's, and check every byte."""
    with Client() as client:
        if what.startswith("job_"):
            files = fetch_all(client, what, out or Path())
        else:
            files = [_fetch(client, what, out or Path())]
    if as_json:
        show_json({"files": [str(file) for file in files]})
    else:
        for file in files:
            show(str(file))


def fetch_all(client: Client, job_id: str, folder: Path) -> list[Path]:
    """Download every artifact of a job into ``folder``."""
    artifacts = client.artifacts(job_id)
    folder.mkdir(parents=True, exist_ok=True)
    if len({target(artifact, folder) for artifact in artifacts}) < len(artifacts):
        raise InvalidInput(f"Several artifacts of {job_id} have the same name: get them one by one, by id.")
    with TransferProgress("downloading", sum(artifact.size_bytes for artifact in artifacts)) as transfer:
        return [client.download(artifact, folder, on_bytes=transfer.on_bytes) for artifact in artifacts]


def _fetch(client: Client, artifact_id: str, path: Path) -> Path:
    artifact = client.artifact(artifact_id)
    with TransferProgress(artifact.name, artifact.size_bytes) as transfer:
        return client.download(artifact, path, on_bytes=transfer.on_bytes)

"""``noisemill up``, ``down``, ``status`` and ``demo``: the local stack. They need ``noisemill[local]``."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noisemill.cli.options import AsJson, DataDir
from noisemill.discovery import default_data_dir
from noisemill.errors import ClientError
from noisemill.terminal import say, show, show_fields, show_json, show_table

if TYPE_CHECKING:
    from noisemill.local.stack import Stack


class StackFailed(ClientError):
    """The local stack could not be brought up or down; the message says what to do."""

    code = "stack_failed"


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    for command in (up, down, status, demo):
        app.command()(command)


def up(
    data_dir: DataDir = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port of the API.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once everything runs, and leave it running.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Start the local stack: Valkey, PostgreSQL, S3, API, workers, Flower. Ctrl-C stops it."""
    if as_json and not detach:
        raise typer.BadParameter("--json needs --detach", param_hint="--json")
    with _stack(data_dir) as stack:
        if detach:
            addresses = stack.up(port=port)
            (show_json if as_json else _show_addresses)(addresses)
        else:
            stack.run(port=port, on_up=_show_addresses)


def down(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Stop what `noisemill up` started. The data stays."""
    with _stack(data_dir) as stack:
        stopped = stack.down()
    if as_json:
        show_json({"stopped": stopped})
    elif not stopped:
        say(f"Nothing was running in {stack.data_dir}.")


def status(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show the processes of the local stack."""
    with _stack(data_dir) as stack:
        parts = stack.status()
    if as_json:
        show_json({"data_dir": str(stack.data_dir), "parts": [vars(part) for part in parts]})
    elif parts:
        show_table(("part", "pid", "state"), [(p.name, p.pid, "running" if p.is_running else "ended") for p in parts])
    else:
        show(f"No stack runs in {stack.data_dir}: start one with `noisemill up`.")


def demo(
    folder: Annotated[
        Path, typer.Option("--folder", help="Where samples.png goes, and the data of the demo's stack.")
    ] = Path("demo"),
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack running.")] = False,
) -> None:
    """Train a model on handwritten digits and draw 64 new ones, through every real part."""
    from noisemill.demo import Demo

    with _stack(folder / ".stack") as stack:
        Demo(stack, folder=folder).run(keep=keep)


@contextmanager
def _stack(data_dir: Path | None) -> Iterator["Stack"]:
    try:
        from noisemill.local.processes import LocalError
        from noisemill.local.stack import Stack

        stack = Stack(data_dir or default_data_dir(), say=say)
    except ImportError as error:
        raise StackFailed(f"The local stack is not installed ({error}): pip install 'noisemill[local]'.") from error
    try:
        yield stack
    except ModuleNotFoundError as error:
        raise StackFailed(
            f"A part of the local stack is not installed ({error}): pip install 'noisemill[demo]'."
        ) from error
    except LocalError as error:
        raise StackFailed(str(error)) from error


def _show_addresses(addresses: Mapping[str, Any]) -> None:
    flower = f"{addresses['flower_url']} (user {addresses['flower_user']}, password {addresses['flower_password']})"
    show_fields(
        {
            "page": addresses["api_url"],
            "API key": addresses["api_key"],
            "Flower": flower if addresses["flower_url"] else None,
        }
    )

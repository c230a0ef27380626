"""The root of the command line: puts the commands together and turns errors into sentences and exit codes."""

import errno
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from noisemill.cli import aliases, artifacts, datasets, jobs, models, stack, submission
from noisemill.errors import ClientError
from noisemill.terminal import complain, say


class Commands(TyperGroup):
    """Runs a command; what may go wrong ends in one or two sentences, never in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ClientError as error:
            complain(str(error))
        except KeyboardInterrupt:
            say("Interrupted.")
            raise typer.Exit(130) from None
        except OSError as error:
            if error.errno in (None, errno.EPIPE):
                raise
            complain(str(error))
        raise typer.Exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        try:
            print(version("noisemill"))
        except PackageNotFoundError:
            print("unknown (not installed)")
        raise typer.Exit


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.callback()
def noisemill(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Train generative models and draw samples from them, on your own machines.

    The server is NOISEMILL_URL with the key NOISEMILL_API_KEY, or the nearest running local stack.
    """


for group in (stack, submission):
    group.register(app)
app.add_typer(jobs.app, name="jobs")
app.add_typer(datasets.app, name="datasets")
app.add_typer(models.app, name="models")
app.add_typer(aliases.app, name="alias")
app.add_typer(artifacts.app, name="artifacts")
app.command("workers")(jobs.workers)


def main() -> None:
    """Entry point of the ``noisemill`` command."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)

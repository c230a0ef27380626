"""``noisemill alias``: names for versions of models, moved by a gate."""

from itertools import islice
from typing import Annotated, Any

import typer

from noisemill.cli.options import AsJson, Limit, pairs
from noisemill.client import Client
from noisemill.errors import ApiError
from noisemill.terminal import say, show, show_fields, show_json, show_table
from shared.specs.gate import Bound

app = typer.Typer(help="Name versions of models, and move the names by a gate.", no_args_is_help=True)

Ref = Annotated[str, typer.Argument(metavar="MODEL@ALIAS", help="The alias, as in digits@production.")]
Numbers = list[str] | None


@app.command("set")
def set_alias(  # noqa: PLR0913, PLR0917 - a parameter is an option
    ref: Ref,
    version: Annotated[int, typer.Argument(metavar="VERSION", help="Number of the version.", min=1)],
    at_most: Annotated[
        Numbers, typer.Option("--at-most", metavar="METRIC=NUMBER", help="Bound of the gate; may be repeated.")
    ] = None,
    at_least: Annotated[
        Numbers, typer.Option("--at-least", metavar="METRIC=NUMBER", help="Bound of the gate; may be repeated.")
    ] = None,
    no_worse: Annotated[
        Numbers,
        typer.Option(
            "--no-worse",
            metavar="METRIC[=lower|higher]",
            help="As good as the version it stands for now, and which way is better if that is not known.",
        ),
    ] = None,
    no_gate: Annotated[bool, typer.Option("--no-gate", help="Take the gate away.")] = False,
    evaluation: Annotated[
        str | None,
        typer.Option("--evaluation", metavar="JOB", help="The evaluate job to look at.", show_default="newest"),
    ] = None,
    was: Annotated[
        int | None, typer.Option("--was", help="Refuse if it stands for another version than this until now.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an alias, or move it to a version that passes its gate.

    Bounds make up a new gate; without any the gate stays as it is.
    """
    gate = [{"metric": name, "at_most": value} for name, value in _numbers(at_most, "--at-most")]
    gate += [{"metric": name, "at_least": value} for name, value in _numbers(at_least, "--at-least")]
    gate += [_no_worse(text) for text in no_worse or ()]
    if gate and no_gate:
        raise typer.BadParameter("either bounds, or no gate", param_hint="--no-gate")
    with Client() as client:
        try:
            alias = client.aliases.move(
                ref, version, gate=gate if gate or no_gate else None, evaluation=evaluation, was=was
            )
        except ApiError as error:
            if as_json and error.problem.checks is not None:
                show_json(error.problem)
            raise
    if as_json:
        show_json(alias)
    else:
        show(f"{alias.ref} is {alias.model}@{alias.version}")


@app.command("list")
def list_aliases(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model.")],
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """List the aliases of a model."""
    with Client() as client:
        found = list(islice(client.aliases.list(model), limit))
    if as_json:
        show_json(found)
    elif not found:
        say(f"No aliases. Make one with `noisemill alias set {model}@production VERSION`.")
    else:
        rows = [(one.ref, one.version, _told(one.gate), one.created_at) for one in found]
        show_table(("alias", "version", "gate", "created"), rows)


@app.command("show")
def show_alias(ref: Ref, as_json: AsJson = False) -> None:
    """Show what an alias stands for, and its gate."""
    with Client() as client:
        alias = client.aliases.get(ref)
    if as_json:
        show_json(alias)
    else:
        fields: dict[str, Any] = {"alias": alias.ref, "version": alias.version, "gate": _told(alias.gate)}
        show_fields(fields | {"created": alias.created_at})


@app.command("history")
def history(ref: Ref, limit: Limit = 20, as_json: AsJson = False) -> None:
    """Show who moved an alias, when, and by what figures."""
    with Client() as client:
        found = list(islice(client.aliases.moves(ref), limit))
    if as_json:
        show_json(found)
        return
    rows = [
        (
            one.created_at,
            one.from_version,
            one.to_version,
            one.key_hint,
            "; ".join(check.reason for check in one.checks),
        )
        for one in found
    ]
    show_table(("when", "from", "to", "key", "what it showed"), rows)


@app.command("delete")
def delete_alias(ref: Ref) -> None:
    """Remove an alias with its gate; the version and the history stay."""
    with Client() as client:
        client.aliases.remove(ref)
    say(f"Removed {ref}.")


def _numbers(texts: list[str] | None, option: str) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, text in pairs(texts, option).items():
        try:
            found.append((name, float(text)))
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not a number", param_hint=option) from None
    return found


def _no_worse(text: str) -> dict[str, Any]:
    name, _, better = text.partition("=")
    return {"metric": name, "no_worse_than_current": True} | ({"better": better} if better else {})


def _told(gate: list[Bound]) -> str:
    """The gate on one line."""
    return ", ".join(_bound(bound) for bound in gate) or "none"


def _bound(bound: Bound) -> str:
    if bound.at_most is not None:
        return f"{bound.metric} ≤ {bound.at_most:g}"
    return f"{bound.metric} no worse" if bound.at_least is None else f"{bound.metric} ≥ {bound.at_least:g}"

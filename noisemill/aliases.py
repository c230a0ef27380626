"""Aliases of models: ``client.aliases``."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from noisemill.answers import parse, quoted
from noisemill.errors import InvalidInput
from noisemill.pages import fetch, fetch_all
from noisemill.transport import Transport
from shared.specs.gate import Bound
from shared.wire import AliasMoveView, AliasView


class Aliases:
    """Names for versions of models, which move only to versions that pass their gate.

    An alias is named as jobs name it: ``digits@production``.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self, model: str) -> Iterator[AliasView]:
        """All aliases of a model, fetched page by page."""
        return fetch_all(self._transport, AliasView, f"/v1/models/{quoted(model)}/aliases")

    def get(self, ref: str) -> AliasView:
        """What the alias stands for now."""
        return fetch(self._transport, AliasView, _path(ref))

    def move(
        self,
        ref: str,
        version: int,
        *,
        gate: Sequence[Bound | Mapping[str, Any]] | None = None,
        evaluation: str | None = None,
        was: int | None = None,
    ) -> AliasView:
        """Make an alias, or move it to another version: ``move("digits@production", 3)``. Idempotent.

        Args:
            ref: the alias.
            version: number of the version that it shall stand for.
            gate: takes the place of the alias's gate, which has to be passed all the same.
            evaluation: id of the evaluate job to look at; for each bound the newest when left out.
            was: the version that the alias must stand for until now, so that nobody's move is undone unseen.

        Raises:
            ApiError: ``gate_failed``, and ``error.problem.checks`` tells bound by bound; or ``precondition_failed``:
                the alias stands for another version than ``was``.
        """
        body: dict[str, Any] = {"version": version, "evaluation": evaluation}
        if gate is not None:
            body["gate"] = [bound.model_dump(mode="json") if isinstance(bound, Bound) else bound for bound in gate]
        headers = {} if was is None else {"If-Match": self._tag(ref, was)}
        answer = self._transport.request("PUT", _path(ref), repeatable=True, json=body, headers=headers)
        return parse(AliasView, answer.content)

    def remove(self, ref: str) -> None:
        """Take the name away, with its gate; its history stays."""
        self._transport.request("DELETE", _path(ref), repeatable=False)

    def moves(self, ref: str) -> Iterator[AliasMoveView]:
        """How the alias was moved, newest first, fetched page by page."""
        return fetch_all(self._transport, AliasMoveView, f"{_path(ref)}/moves")

    def _tag(self, ref: str, was: int) -> str:
        """The tag of the alias while it stands for ``was``; one that nothing has, if it does not."""
        answer = self._transport.request("GET", _path(ref), repeatable=True)
        now = parse(AliasView, answer.content).version
        return answer.headers["ETag"] if now == was else '"another"'


def _path(ref: str) -> str:
    model, _, alias = ref.partition("@")
    if not model or not alias:
        raise InvalidInput(f"{ref!r} names no alias: give the model and the alias, as in digits@production.")
    return f"/v1/models/{quoted(model)}/aliases/{quoted(alias)}"

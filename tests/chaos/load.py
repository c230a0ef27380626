"""What is asked of the system during a run, over REST as a client asks: mixed jobs, each with what must become of it.

Some orders are chains of jobs that are submitted at once, where each waits for the model that the one before makes. A
few distinct requests are asked again and again, so that an undisturbed run of each gives the bytes to compare with.
Whoever gets no answer asks again with the same idempotency key, as the client library does.
"""

import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Final, TypeVar

import httpx
import numpy as np

from noisemill import uploads
from noisemill.client import Client
from noisemill.errors import ApiError, ServerUnreachable, TransferFailed
from shared.wire import JobView

T = TypeVar("T")

PATIENCE: Final = 300.0
"""Seconds after which a client gives up, which is a violation."""
_USERS: Final = 8
_SMALL: Final = {"family": "vae", "network": "mlp", "hidden_dim": 32, "latent_dim": 4, "batch_size": 16}
_WELL: Final = frozenset({"succeeded"})
_PASSING: Final = frozenset({429, 502, 503, 504, 507})


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One sort of order: what is asked for, what is done to it then, and how it must end."""

    share: int
    """Of a hundred orders."""
    asks: str
    then: str = "nothing"
    ends: frozenset[str] = _WELL
    error: str | None = None


KINDS: Final[Mapping[str, Kind]] = {
    "generate": Kind(share=44, asks="generate"),
    "train": Kind(share=14, asks="train"),
    "training that starts over": Kind(share=2, asks="steady"),
    "ingest": Kind(share=6, asks="ingest"),
    "refused data": Kind(share=4, asks="garbage", ends=frozenset({"failed"}), error="dataset_invalid"),
    "too long": Kind(share=3, asks="endless", ends=frozenset({"failed"}), error="timeout"),
    "canceled training": Kind(share=6, asks="train", then="cancel", ends=frozenset({"canceled", "succeeded"})),
    "canceled drawing": Kind(share=3, asks="generate", then="cancel", ends=frozenset({"canceled", "succeeded"})),
    "paused training": Kind(share=8, asks="train", then="pause"),
    "tried again": Kind(share=4, asks="train", then="retry", ends=frozenset({"canceled", "succeeded"})),
    "chain": Kind(share=3, asks="chain"),
    "canceled chain": Kind(share=2, asks="chain", then="cancel", ends=frozenset({"canceled", "succeeded"})),
    "doomed chain": Kind(share=1, asks="doomed", ends=frozenset({"failed"}), error="timeout"),
}
"""Of a chain it is the first job that this is said of; how the others end, that decides (``Ticket.needs``)."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One job to submit."""

    number: int
    kind: str
    request: str
    """Name of the distinct request."""
    delay: float
    """Seconds from the submission to what is done then."""

    @property
    def key(self) -> str:
        return f"order-{self.number}"


@dataclass(kw_only=True)
class Ticket:
    """What a client knows of one job: its id, and what it was told."""

    job_id: str
    request: str
    ends: frozenset[str]
    error: str | None = None
    told: dict[str, str] = field(default_factory=dict[str, str])
    """State in the answer to each action."""
    needs: str | None = None
    """The job that it named in the place of a model. Unless that succeeds this one must end as dependency_failed."""
    field: str = "model"
    """Of its spec, where it named that."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """One job of a chain: all but the first name the job before, by its id, where a model is named."""

    request: str
    body: dict[str, Any]
    field: str = ""
    """Of the spec."""

    def after(self, needed: str | None) -> dict[str, Any]:
        """What to ask for, once the id of the job before is known."""
        return self.body if needed is None else self.body | {"spec": self.body["spec"] | {self.field: needed}}


class Catalogue:
    """The distinct requests, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.bodies: dict[str, dict[str, Any]] = {}
        self.chains: dict[str, list[Link]] = {}
        self.files = {f"ingest-{seed}": _blobs(folder / f"blobs-{seed}.npz", seed) for seed in range(2)}
        self.files["garbage-0"] = folder / "garbage.npz"
        self.files["garbage-0"].write_bytes(b"PK\x03\x04" + bytes(3000))

    def describe(self, dataset: str, model: str) -> None:
        """Fill in the requests that need a dataset and a model, once there are some."""
        drawn = {"model": model}
        quiet = _SMALL | {"dataset": dataset, "preview_every": 1_000_000}
        for seed in range(4):
            train = quiet | {"model": f"trained-{seed}", "seed": seed, "checkpoint_every": 60}
            self.bodies[f"train-{seed}"] = _train(train | {"steps": 200 + 100 * seed})
            self.bodies[f"generate-{seed}"] = _generate(drawn | {"num_samples": 4 + 8 * seed, "seed": seed})
        self.bodies["generate-many-0"] = _generate(drawn | {"num_samples": 160})
        self.bodies["steady-0"] = _train(quiet | {"model": "steady", "steps": 1000, "checkpoint_every": 1_000_000})
        for seed in range(2):
            paths = {"num_pairs": 2 + seed, "num_points": 4, "seed": seed}
            self.bodies[f"generate-walk-{seed}"] = _generate(drawn | {"task": "interpolate"} | paths)
            pictures = {"task": "reconstruct", "dataset": dataset, "num_samples": 6 + 6 * seed}
            self.bodies[f"generate-again-{seed}"] = _generate(drawn | pictures)
        endless = _train(quiet | {"model": "endless", "steps": 10_000_000}) | {"timeout_seconds": 4}
        self.bodies["endless-0"] = endless
        for seed in range(2):
            first = _train(quiet | {"model": f"first-{seed}", "seed": seed, "steps": 150, "checkpoint_every": 60})
            self.chains[f"chain-{seed}"] = self._chain(f"chain-{seed}", first, quiet, seed)
        self.chains["doomed-0"] = self._chain("doomed-0", endless, quiet, 0)

    def _chain(self, name: str, first: dict[str, Any], quiet: Mapping[str, Any], seed: int) -> list[Link]:
        """A training, one that goes on from its weights, and samples of what that makes."""
        second = _train({**quiet, "model": f"second-{seed}", "seed": seed, "steps": 100, "checkpoint_every": 60})
        return [
            Link(request=f"{name}/first", body=first),
            Link(request=f"{name}/second", body=second, field="init_from"),
            Link(request=f"{name}/drawn", body=_generate({"num_samples": 6, "seed": seed}), field="model"),
        ]

    @property
    def lasting(self) -> list[str]:
        """The requests that end with bytes, and have a reference."""
        named = [*self.bodies, *self.files]
        return [name for name in named if not name.startswith(("garbage", "endless"))]

    def choose(self, what: str, chance: random.Random) -> str:
        named = (*self.bodies, *self.files, *self.chains)
        return chance.choice([name for name in named if name.startswith(what)])

    def submit(self, client: Client, request: str, key: str) -> str:
        """Ask for it until there is an answer; returns the id of the job."""
        if request in self.files:
            return _upload(client, self.files[request], key)
        return _submit(client, self.bodies[request], key)

    def submit_chain(self, client: Client, name: str, key: str) -> Iterator[tuple[Link, str]]:
        """Ask for all of its jobs at once; yields each link with the id of its job."""
        needed = None
        for number, link in enumerate(self.chains[name]):
            needed = _submit(client, link.after(needed), f"{key}-{number}")
            yield link, needed


def tells_versions(request: str) -> bool:
    """Whether what it makes says of which version it was made: those of a chain are others each time."""
    return request.startswith("chain") and not request.endswith("/first")


def _submit(client: Client, body: Mapping[str, Any], key: str) -> str:
    return insist(lambda: client.submit({**body, "max_attempts": 10}, idempotency_key=key)).id


def _train(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "train", "spec": dict(spec) | {"warmup_steps": 0}}


def _generate(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "generate", "spec": {"task": "generate"} | dict(spec)}


def _blobs(path: Path, seed: int) -> Path:
    """120 pictures of blobs, 12 x 12, in two classes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:12, :12]
    centres = rng.uniform(2, 9, size=(120, 2))
    images = [255 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 6) for cx, cy in centres]
    np.savez(path, images=np.array(images).astype(np.uint8), labels=(centres[:, 0] > 5.5).astype(np.int64))
    return path


def insist(act: Callable[[], T]) -> T:
    """Do it again until it is answered, as people do; what cannot be repeated must not be passed here."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return act()
        except (ServerUnreachable, TransferFailed, httpx.TransportError):
            if time.monotonic() > deadline:
                raise
        except ApiError as error:
            may_pass = error.status in _PASSING or error.code == "idempotency_in_progress"
            if not may_pass or time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def _ask(client: Client, job_id: str, verb: str) -> JobView:
    """Cancel, pause, resume or retry; each is idempotent."""
    return JobView.model_validate(
        client._transport.request("POST", f"/v1/jobs/{job_id}/{verb}", repeatable=True).json()
    )


def _upload(client: Client, file: Path, name: str) -> str:
    """Straight to storage, each step until it is answered. Announcing twice leaves an empty dataset, no more."""
    send = client._transport.request
    announced = {"name": name, "filename": file.name, "size_bytes": file.stat().st_size, "modality": "image"}
    dataset = insist(lambda: send("POST", "/v1/datasets", repeatable=True, json=announced)).json()
    insist(lambda: uploads.put(client._storage, dataset["upload"], file, None))
    done = insist(lambda: send("POST", f"/v1/datasets/{dataset['id']}/complete", repeatable=True)).json()
    return str(done["job_id"])


def plan(catalogue: Catalogue, jobs: int, seed: int, only: Collection[str] | None = None) -> Iterator[Order]:
    """Orders without end, in the shares of ``KINDS``; each ``jobs`` of them hold every kind."""
    chance, numbers = random.Random(f"load {seed}"), count()
    chosen = {name: kind for name, kind in KINDS.items() if only is None or name in only}
    while True:
        others = chance.choices(list(chosen), [kind.share for kind in chosen.values()], k=max(0, jobs - len(chosen)))
        for name in chance.sample([*chosen, *others], len(chosen) + len(others)):
            request = catalogue.choose(chosen[name].asks, chance)
            yield Order(number=next(numbers), kind=name, request=request, delay=chance.uniform(0, 8))


class Load:
    """Clients that place orders, as many at a time as ``release`` lets through."""

    def __init__(self, url: str, api_key: str, catalogue: Catalogue) -> None:
        self._address, self._catalogue = (url, api_key), catalogue
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._users = [Thread(target=self._use, name=f"user-{n}", daemon=True) for n in range(_USERS)]
        self.tickets: list[Ticket] = []
        self.complaints: list[str] = []
        """What a client was refused or never answered."""
        self.released = 0
        self.done = 0

    def start(self) -> None:
        for user in self._users:
            user.start()

    def release(self, order: Order) -> None:
        """Let some client place this order."""
        self.released += 1
        self._orders.put(order)

    def finish(self, timeout: float) -> bool:
        """No more orders; wait until all are placed. False if some client still waits for an answer."""
        for _ in self._users:
            self._orders.put(None)
        deadline = time.monotonic() + timeout
        for user in self._users:
            user.join(max(0, deadline - time.monotonic()))
        return not any(user.is_alive() for user in self._users)

    def _use(self) -> None:
        with Client(*self._address, timeout=20.0) as client:
            while (order := self._orders.get()) is not None:
                try:
                    self._place(client, order)
                except Exception as error:  # noqa: BLE001  (whatever it was, the report must say it)
                    self.complaints.append(
                        f"{order.key} ({order.kind}, {order.request}): {type(error).__name__}: {error}"
                    )
                self.done += 1

    def _place(self, client: Client, order: Order) -> None:
        kind = KINDS[order.kind]
        if order.request in self._catalogue.chains:
            ticket = self._place_chain(client, order, kind)
        else:
            job_id = self._catalogue.submit(client, order.request, order.key)
            ticket = Ticket(job_id=job_id, request=order.request, ends=kind.ends, error=kind.error)
            self.tickets.append(ticket)
        if kind.then != "nothing":
            time.sleep(order.delay)
            ACTIONS[kind.then](self, client, ticket)

    def _place_chain(self, client: Client, order: Order, kind: Kind) -> Ticket:
        """Returns the ticket of its first job."""
        placed: list[Ticket] = []
        try:
            for link, job_id in self._catalogue.submit_chain(client, order.request, order.key):
                about: dict[str, Any] = {"ends": kind.ends, "error": kind.error}
                if placed:
                    about = {"ends": _WELL, "needs": placed[-1].job_id, "field": link.field}
                placed.append(Ticket(job_id=job_id, request=link.request, **about))
                self.tickets.append(placed[-1])
        except ApiError as error:
            # Of a job that has failed before the next one was submitted nothing can be asked any more.
            if error.code != "dependency_failed" or kind.error is None:
                raise
        return placed[0]

    def cancel(self, client: Client, ticket: Ticket) -> None:
        ticket.told["cancel"] = insist(lambda: _ask(client, ticket.job_id, "cancel")).state

    def pause(self, client: Client, ticket: Ticket) -> None:
        """Pause, wait until that is so or too late, and resume; on odd tickets resume at once."""
        with suppress(_TooLate):
            ticket.told["pause"] = _unless_too_late(lambda: _ask(client, ticket.job_id, "pause")).state
            if len(self.tickets) % 2:
                self._until(client, ticket, {"paused"})
            ticket.told["resume"] = _unless_too_late(lambda: _ask(client, ticket.job_id, "resume")).state

    def retry(self, client: Client, ticket: Ticket) -> None:
        """Cancel, and try again once that is so; the second job must succeed."""
        self.cancel(client, ticket)
        if self._until(client, ticket, set()) == "canceled":
            again = insist(lambda: _ask(client, ticket.job_id, "retry"))
            self.tickets.append(Ticket(job_id=again.id, request=ticket.request, ends=frozenset({"succeeded"})))

    def _until(self, client: Client, ticket: Ticket, states: set[str]) -> str:
        """Look until the job is in one of the states, or has ended."""
        deadline = time.monotonic() + PATIENCE
        while True:
            job = insist(lambda: client.job(ticket.job_id))
            if job.is_final or job.state in states:
                return job.state
            if time.monotonic() > deadline:
                raise TimeoutError(f"{ticket.job_id} is still {job.state}")
            time.sleep(0.5)


class _TooLate(Exception):
    """The job had ended before."""


def _unless_too_late(act: Callable[[], T]) -> T:
    try:
        return insist(act)
    except ApiError as error:
        if error.code == "invalid_state":
            raise _TooLate from error
        raise


ACTIONS: Final[Mapping[str, Callable[[Load, Client, Ticket], None]]] = {
    "cancel": Load.cancel,
    "pause": Load.pause,
    "retry": Load.retry,
}


def references(
    client: Client,
    catalogue: Catalogue,
    wait: Callable[[Sequence[str]], None],
    only: Collection[str] | None = None,
) -> dict[str, str]:
    """Run every lasting request (``only``: of these kinds) once, undisturbed; returns the id of the job of each."""
    first = catalogue.submit(client, "ingest-0", "reference-ingest-0")
    wait([first])
    (dataset,) = [one.id for one in client.datasets() if one.job_id == first]
    base = _SMALL | {"dataset": dataset, "model": "base", "steps": 60, "warmup_steps": 0}
    trained = client.submit({"type": "train", "spec": base}, idempotency_key="reference-base").id
    wait([trained])
    catalogue.describe(dataset, "base@1")
    asked = tuple(kind.asks for name, kind in KINDS.items() if only is None or name in only)
    rest = [name for name in catalogue.lasting if name != "ingest-0" and name.startswith(asked)]
    jobs = {name: catalogue.submit(client, name, f"reference-{name}") for name in rest}
    for chain in catalogue.chains:
        if chain.startswith(asked) and not chain.startswith("doomed"):
            links = catalogue.submit_chain(client, chain, f"reference-{chain}")
            jobs |= {link.request: job_id for link, job_id in links}
    wait(list(jobs.values()))
    return {"ingest-0": first, "base": trained, **jobs}

"""What should run, worked out from what was chosen before, what the environment gives, and what was asked."""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from noisemill.local.folder import DataFolder
from noisemill.local.ports import free_port
from noisemill.local.processes import LocalError, Part
from noisemill.local.servers import ObjectStore, Postgres, Valkey
from noisemill.local.services import S3Access, Services, Wiring

USUAL_API_PORT = 8000

# They would change what a child does behind our back (an open Flower, another broker), or are the client's alone
# and must not count as a changed stack.
_NOT_INHERITED = ("FLOWER_", "CELERY_", "NANIO_", "NOISEMILL_URL")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the caller of ``up`` asked for."""

    port: int | None = None
    train_workers: int = 1
    generate_workers: int = 1
    flower: bool = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The parts that should run, in the order to start them."""

    wiring: Wiring
    servers: Sequence[Part]
    services: Services
    base_env: Mapping[str, str]

    @property
    def parts(self) -> list[Part]:
        return [*self.servers, *self.services.parts]

    def fingerprint(self, part: Part) -> str:
        """Equal for two plans that would start ``part`` in the same way."""
        reads_settings = part not in self.servers
        inherited = {k: v for k, v in self.base_env.items() if reads_settings and k.startswith("NOISEMILL_")}
        told = json.dumps([list(part.argv), inherited | dict(part.env)], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def make_plan(
    folder: DataFolder,
    wish: Wish,
    environ: Mapping[str, str],
    *,
    running: Collection[str],
    reserve: Callable[[int], bool],
    services: Callable[[Wiring], Services],
) -> Plan:
    """Choose ports and credentials, keep them, and lay out every part.

    ``reserve``: says whether a port is free, and keeps it so (``ports.reserving``).

    Raises:
        LocalError: the wanted port is taken, or the environment names an external part incompletely.
    """
    choices = folder.choices()
    ports = _Ports(choices.ports, running, reserve)
    postgres = Postgres(folder=folder.path / "postgres", port=ports.of("postgres"), password=choices.postgres_password)
    valkey = Valkey(folder=folder.path / "valkey", port=ports.of("valkey"), password=choices.valkey_password)
    store = ObjectStore(
        folder=folder.path / "s3",
        port=ports.of("s3"),
        access_key=choices.s3_access_key,
        secret_key=choices.s3_secret_key,
    )
    wiring = Wiring(
        api_port=ports.of("api", wanted=wish.port, usual=USUAL_API_PORT),
        api_key=choices.api_key,
        flower_port=ports.of("flower") if wish.flower else None,
        flower_password=choices.flower_password,
        database_url=environ.get("NOISEMILL_DATABASE_URL", postgres.url),
        broker_url=environ.get("NOISEMILL_BROKER_URL", valkey.url),
        broker_prefix=environ.get("NOISEMILL_BROKER_PREFIX", "noisemill:"),
        s3=_external_s3(environ) or _s3_of(store, environ),
        cache=folder.path / "cache",
        train_workers=wish.train_workers,
        generate_workers=wish.generate_workers,
        threads=None if "NOISEMILL_WORKER_THREADS" in environ else _fair_share(wish),
    )
    folder.keep(choices)
    return Plan(
        wiring=wiring,
        servers=_not_replaced(environ, postgres, valkey, store),
        services=services(wiring),
        base_env=_base_env(environ),
    )


def _not_replaced(environ: Mapping[str, str], postgres: Postgres, valkey: Valkey, store: ObjectStore) -> list[Part]:
    """Those for which the environment does not name another."""
    replaced_by = {
        "NOISEMILL_DATABASE_URL": postgres,
        "NOISEMILL_BROKER_URL": valkey,
        "NOISEMILL_S3_ENDPOINT": store,
    }
    return [server for variable, server in replaced_by.items() if variable not in environ]


def _fair_share(wish: Wish) -> int:
    """Threads for each worker, so that all of them together have no more than there are cores."""
    return max(1, (os.cpu_count() or 1) // max(1, wish.train_workers + wish.generate_workers))


class _Ports:
    """Keeps each part's port where it can."""

    def __init__(self, kept: dict[str, int], running: Collection[str], reserve: Callable[[int], bool]) -> None:
        self._kept = kept
        self._running = running
        self._reserve = reserve

    def of(self, name: str, *, wanted: int | None = None, usual: int | None = None) -> int:
        kept = self._kept.get(name)
        if wanted is not None and not self._usable(name, wanted):
            raise LocalError(f"Port {wanted} is in use by another program; choose another with --port.")
        port = wanted or self._usable(name, kept) or self._usable(name, usual) or free_port()
        self._kept[name] = port
        return port

    def _usable(self, name: str, port: int | None) -> int | None:
        """``port``, if the part itself listens there or could."""
        holds_it = port == self._kept.get(name) and name in self._running
        return port if port is not None and (holds_it or self._reserve(port)) else None


def _s3_of(store: ObjectStore, environ: Mapping[str, str]) -> S3Access:
    return S3Access(
        endpoint=store.endpoint,
        bucket=environ.get("NOISEMILL_S3_BUCKET", "noisemill"),
        access_key=store.access_key,
        secret_key=store.secret_key,
    )


def _external_s3(environ: Mapping[str, str]) -> S3Access | None:
    if "NOISEMILL_S3_ENDPOINT" not in environ:
        return None
    missing = {"NOISEMILL_S3_ACCESS_KEY", "NOISEMILL_S3_SECRET_KEY"} - environ.keys()
    if missing:
        raise LocalError(f"NOISEMILL_S3_ENDPOINT is set, so {' and '.join(sorted(missing))} must be set, too.")
    return S3Access(
        endpoint=environ["NOISEMILL_S3_ENDPOINT"],
        bucket=environ.get("NOISEMILL_S3_BUCKET", "noisemill"),
        access_key=environ["NOISEMILL_S3_ACCESS_KEY"],
        secret_key=environ["NOISEMILL_S3_SECRET_KEY"],
    )


def _base_env(environ: Mapping[str, str]) -> dict[str, str]:
    env = {key: value for key, value in environ.items() if not key.startswith(_NOT_INHERITED)}
    # boto3 and others would send requests for this machine to a proxy that cannot reach it.
    direct = [env.get("NO_PROXY") or env.get("no_proxy") or "", "127.0.0.1", "localhost"]
    env["NO_PROXY"] = env["no_proxy"] = ",".join(filter(None, direct))
    return env | {"PYTHONUNBUFFERED": "1"}

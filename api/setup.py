"""``python -m api.setup``: make the servers ready for Noisemill. Safe to run again, and several times at once.

Migrates the database, creates the bucket, and registers ``NOISEMILL_API_KEY`` for the tenant ``default``. Waits for
servers that are still starting.
"""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final, TextIO

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session
from sqlmodel import col

from api.auth import SCOPES, digest
from shared.database import AWAY, make_engine
from shared.errors import NoisemillError, StorageError
from shared.jobs.rows import ApiKey, Tenant
from shared.migrations import migrate
from shared.settings import Settings
from shared.storage import Storage

TENANT: Final = "default"
PATIENCE: Final = timedelta(seconds=60)
MIN_KEY_LENGTH: Final = 20
_MIN_DIFFERENT: Final = 8
_PLACEHOLDERS: Final = (
    "change",
    "placeholder",
    "example",
    "secret",
    "password",
    "your-",
    "your_",
    "xxxx",
    "<",
    "12345678",
)


class SetupError(NoisemillError):
    """Something only the operator can put right."""


def main() -> int:
    """Set everything up; returns the exit status."""
    try:
        settings = Settings.read()
        key = settings.api.key
        if key is not None:
            check_key(key.get_secret_value())
        _patiently("database", lambda: migrate(settings.database.url.get_secret_value()))
        _say("database: the schema is up to date")
        _patiently("storage", Storage(settings.s3).ensure_bucket)
        _say(f"storage: the bucket {settings.s3.bucket} is there")
        _say(
            "key: none given (NOISEMILL_API_KEY)"
            if key is None
            else f"key: {register(settings, key.get_secret_value())}"
        )
    except ValidationError as error:
        for wrong in error.errors(include_input=False, include_url=False):
            name = "_".join(str(part) for part in wrong["loc"]).upper()
            _say(f"error: NOISEMILL_{name}: {wrong['msg']}", sys.stderr)
        return 2
    except SetupError as error:
        _say(f"error: {error}", sys.stderr)
        return 1
    return 0


def check_key(key: str) -> None:
    """Refuse a key that could be guessed.

    Raises:
        SetupError: it is short, a placeholder, or has few different characters.
    """
    how = "generate one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
    if len(key) < MIN_KEY_LENGTH:
        raise SetupError(f"NOISEMILL_API_KEY has fewer than {MIN_KEY_LENGTH} characters; {how}")
    if any(word in key.lower() for word in _PLACEHOLDERS) or len(set(key)) < _MIN_DIFFERENT:
        raise SetupError(f"NOISEMILL_API_KEY looks like a placeholder; {how}")
    if not key.isascii() or any(letter.isspace() for letter in key):
        raise SetupError(f"NOISEMILL_API_KEY must be plain ASCII without spaces, to fit into a header; {how}")


def register(settings: Settings, key: str) -> str:
    """Register the key for the tenant ``default``, unless it is; returns what was found or done."""
    engine = make_engine(settings.database, "noisemill-setup")
    try:
        with Session(engine) as session, session.begin():
            session.execute(insert(Tenant).values(name=TENANT).on_conflict_do_nothing(index_elements=["name"]))
            tenant_id = session.execute(select(col(Tenant.id)).where(col(Tenant.name) == TENANT)).scalar_one()
            row = insert(ApiKey).values(
                tenant_id=tenant_id, digest=digest(key), hint=f"{key[:4]}…", scopes=list(SCOPES)
            )
            added = session.execute(row.on_conflict_do_nothing(index_elements=["digest"]).returning(col(ApiKey.id)))
            if added.one_or_none() is not None:
                return f"{key[:4]}… was registered for the tenant {TENANT}"
            revoked = session.execute(
                select(col(ApiKey.revoked_at)).where(col(ApiKey.digest) == digest(key))
            ).scalar_one()
    finally:
        engine.dispose()
    if revoked is not None:
        raise SetupError("NOISEMILL_API_KEY was revoked; set another")
    return f"{key[:4]}… was registered already"


def _patiently(what: str, act: Callable[[], None]) -> None:
    """Do it, and again while the server is away, for at most ``PATIENCE``."""
    deadline = time.monotonic() + PATIENCE.total_seconds()
    told = False
    while True:
        try:
            act()
        except (*AWAY, StorageError) as error:
            if time.monotonic() > deadline:
                raise SetupError(
                    f"{what}: no answer within {PATIENCE.total_seconds():.0f} s ({type(error).__name__})"
                ) from error
            if not told:
                _say(f"{what}: waiting for it", sys.stderr)
            told = True
            time.sleep(0.5)
        else:
            return


def _say(line: str, where: TextIO | None = None) -> None:
    stream = where or sys.stdout
    stream.write(f"{line}\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())

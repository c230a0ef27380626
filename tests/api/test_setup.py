"""Starting from nothing: what an import loads, and the command that makes the servers ready."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from api import setup
from api.auth import SCOPES, digest
from tests.api.support import environment, make_settings

KEY = "k3y-of-the-test-Zr9Qw7"


def test_importing_the_app_loads_no_model_code() -> None:
    """The twin of the import rules, at run time: an import inside a library would show here, too."""
    code = "import api.app, json, sys; print(json.dumps(sorted(sys.modules)))"

    loaded = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)

    heavy = {"torch", "numpy", "PIL", "worker", "celery", "boto3", "alembic"}
    assert heavy & {name.partition(".")[0] for name in loaded} == set()


def run_setup(**variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "api.setup"]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | variables, timeout=90)


@pytest.fixture
def variables(empty_database: str, valkey: str, object_store: Any) -> dict[str, str]:
    store = {
        "endpoint": object_store.endpoint,
        "access_key": object_store.access_key,
        "secret_key": object_store.secret_key,
    }
    bucket = type("Bucket", (), {})()
    vars(bucket).update(store, bucket="made-by-setup")
    return environment(make_settings(empty_database, valkey, bucket)) | {"NOISEMILL_API_KEY": KEY}


def keys(url: str) -> list[Any]:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = connection.execute(
            text("SELECT name, digest, scopes FROM api_keys JOIN tenants ON tenants.id = tenant_id")
        ).all()
    engine.dispose()
    return [(row.name, bytes(row.digest), row.scopes) for row in found]


def test_setup_makes_schema_bucket_and_key_and_may_run_again_and_at_once(
    variables: dict[str, str],
    empty_database: str,
    object_store: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: run_setup(**variables), range(2)))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    again = setup.main()
    said = capsys.readouterr().out

    assert [again, *(run.returncode for run in runs)] == [0, 0, 0], runs
    assert [line.partition(":")[0] for line in said.splitlines()] == ["database", "storage", "key"]
    assert "registered already" in said and all(KEY not in run.stdout + run.stderr for run in runs)
    assert keys(empty_database) == [("default", digest(KEY), list(SCOPES))]
    assert (object_store.folder / "made-by-setup").is_dir()


@pytest.mark.parametrize(
    "key",
    [
        *("aB3-xY9_qW5.zK7tLmN", "change-me-change-me-change-me", "a" * 40),
        *("your-api-key-goes-here-1", "key with spaces in between it", "k3y-of-the-tést-Zr9Qw7"),
    ],
)
def test_a_key_that_could_be_guessed_is_refused(key: str) -> None:
    with pytest.raises(setup.SetupError, match=r"NOISEMILL_API_KEY.*secrets.token_urlsafe"):
        setup.check_key(key)


def test_setup_stops_before_it_touches_anything_with_a_weak_key() -> None:
    nowhere = {"DATABASE_URL": "postgresql://nowhere", "BROKER_URL": "redis://nowhere"}
    keys = {"S3_ACCESS_KEY": "a", "S3_SECRET_KEY": "b", "API_KEY": "short"}

    run = run_setup(**{f"NOISEMILL_{name}": value for name, value in (nowhere | keys).items()})

    assert (run.returncode, run.stdout) == (1, "")
    assert "NOISEMILL_API_KEY" in run.stderr and "Traceback" not in run.stderr


def test_missing_settings_are_named() -> None:
    run = run_setup(NOISEMILL_BROKER_URL="redis://nowhere")

    assert run.returncode == 2
    assert "NOISEMILL_DATABASE" in run.stderr and "Traceback" not in run.stderr

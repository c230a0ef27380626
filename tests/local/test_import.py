"""Importing the local stack costs nothing that the light client does not pay."""

import json
import subprocess
import sys

HEAVY = {"alembic", "boto3", "celery", "fastapi", "kombu", "numpy", "psutil", "psycopg", "redis", "sqlalchemy", "torch"}


def test_importing_the_local_stack_imports_nothing_heavy() -> None:
    program = "import noisemill.local, json, sys; print(json.dumps(sorted(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert HEAVY.isdisjoint(json.loads(done.stdout))

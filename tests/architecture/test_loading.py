"""What importing a part loads, asked of a fresh interpreter: the run-time twin of the import contracts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import grimp

from tests.architecture.conftest import REPOSITORY, sources

MODEL_LIBRARIES = {"torch", "numpy", "PIL", "safetensors", "triton"}
SERVER_LIBRARIES = {
    "alembic",
    "boto3",
    "botocore",
    "celery",
    "fastapi",
    "kombu",
    "psycopg",
    "redis",
    "sqlalchemy",
    "sqlmodel",
    "starlette",
}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that are loaded after ``statement``."""
    program = (
        f"import sys, json; {statement}; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    )
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "NOISEMILL_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
        "NOISEMILL_BROKER_URL": "redis://127.0.0.1:1/0",
        "NOISEMILL_S3_ACCESS_KEY": "none",
        "NOISEMILL_S3_SECRET_KEY": "none",
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def relative(path: Path) -> Path:
    return path.relative_to(REPOSITORY)


def test_the_api_loads_neither_torch_nor_the_worker():
    loaded = loaded_by("import api.app")

    assert not loaded & MODEL_LIBRARIES
    assert "worker" not in loaded


def test_the_client_loads_no_server_library():
    loaded = loaded_by("import noisemill; noisemill.Client")

    assert not loaded & (SERVER_LIBRARIES | MODEL_LIBRARIES)
    assert not loaded & {"api", "worker"}


def test_the_command_line_loads_no_server_library():
    loaded = loaded_by("import noisemill.cli")

    assert not loaded & (SERVER_LIBRARIES | MODEL_LIBRARIES)


def test_the_supervisor_s_process_does_not_load_torch():
    loaded = loaded_by("import worker.app, worker.tasks, worker.lifecycle")

    assert not loaded & MODEL_LIBRARIES


def test_celery_s_parent_loads_neither_sql_nor_storage():
    """Its child, which does, cannot start before it is up."""
    loaded = loaded_by("import worker.__main__, worker.app, worker.tasks")

    assert "celery" in loaded
    assert not loaded & {"alembic", "boto3", "botocore", "psycopg", "sqlalchemy", "sqlmodel"}


def test_model_code_loads_no_server_library():
    packages = ["worker/engine", "worker/families", "worker/kernels", "worker/metrics"]
    names = [path.with_suffix("").as_posix().replace("/", ".") for path in map(relative, sources(*packages))]
    loaded = loaded_by("; ".join(f"import {name.removesuffix('.__init__')}" for name in names))

    assert "torch" in loaded
    assert not loaded & (SERVER_LIBRARIES | {"pydantic_settings"})


def test_no_family_imports_another():
    """A second family that needs a layer moves it to ``worker/families/nets``; it does not reach into the first."""
    graph = grimp.build_graph("worker", "shared", cache_dir=None)
    shared_ground = {"worker.families.family", "worker.families.nets"}
    families = graph.find_children("worker.families") - shared_ground

    reached = {
        (family, other)
        for family in families
        for other in graph.find_modules_directly_imported_by(family)
        if other.startswith("worker.families.")
        and not any(other == ground or other.startswith(f"{ground}.") for ground in shared_ground)
    }

    assert families
    assert reached == set()


def test_every_family_has_a_spec_of_the_same_name():
    from shared.specs import FAMILIES as SPECS

    registered = {path.stem for path in (REPOSITORY / "worker/families").glob("*.py")} - {"__init__", "family"}

    assert registered == set(SPECS)
    assert all((REPOSITORY / f"shared/specs/{name}.py").exists() for name in SPECS)

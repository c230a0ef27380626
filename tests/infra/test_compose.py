"""The compose file: valid, contained, without a guessable secret, and running what the laptop runs."""

import json
import os
import re
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from api.setup import check_key
from noisemill.local.services import S3Access, Wiring, noisemill_services
from shared.settings import Settings
from tests.infra.conftest import REPOSITORY, VariableMissing, interpolate

FILE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
SERVICES = sorted(FILE["services"])
WORKERS = [name for name in SERVICES if name.startswith("worker-")]
OURS = ["api", "flower", "setup", *WORKERS]
ONE_SHOT = ["setup"]
SECRET_WORDS = re.compile(r"PASSWORD|SECRET|TOKEN|_KEY$")

DOCKER_COMPOSE = (
    shutil.which("docker") is not None
    and subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
)


def seconds(duration: str) -> float:
    amount, unit = re.fullmatch(r"(\d+)(s|m)", duration).groups()
    return int(amount) * {"s": 1, "m": 60}[unit]


def test_the_file_follows_the_compose_specification(compose: dict[str, Any]):
    PyCompose.from_json(json.dumps(compose)).validate()


def test_the_parser_of_the_specification_refuses_what_compose_would(compose: dict[str, Any]):
    """The test above is worth nothing with a parser that takes everything."""
    broken = json.loads(json.dumps(compose))
    broken["services"]["api"]["depends_on"]["setup"]["condition"] = "service_done"

    with pytest.raises(ValueError, match="service_done"):
        PyCompose.from_json(json.dumps(broken))


@pytest.mark.skipif(not DOCKER_COMPOSE, reason="no docker with the compose plugin here")
def test_docker_accepts_the_file(variables: dict[str, str]):
    done = subprocess.run(
        ["docker", "compose", "--profile", "cpu", "--profile", "gpu", "config", "--quiet"],
        env=os.environ | variables,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_runs_as_root(services: dict[str, Any], name: str):
    uid, gid = services[name]["user"].split(":")

    assert int(uid) > 0
    assert int(gid) > 0


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_can_gain_rights_or_change_its_image(services: dict[str, Any], name: str):
    service = services[name]

    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["read_only"] is True


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_is_let_out_of_its_container(services: dict[str, Any], name: str):
    openings = {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "userns_mode", "uts"}

    assert not openings & services[name].keys()
    assert "docker.sock" not in json.dumps(services[name])


@pytest.mark.parametrize("name", SERVICES)
def test_logs_are_bounded(services: dict[str, Any], name: str):
    assert {"max-size", "max-file"} <= services[name]["logging"]["options"].keys()


@pytest.mark.parametrize("name", [name for name in SERVICES if name not in ONE_SHOT])
def test_what_runs_on_is_checked_and_restarted(services: dict[str, Any], name: str):
    assert services[name]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert services[name]["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", SERVICES)
def test_every_image_is_pinned_to_a_version(services: dict[str, Any], name: str):
    image, _, tag = services[name]["image"].rpartition(":")

    assert image
    assert tag not in ("latest", "")


def test_every_dependency_waits_for_what_it_needs(services: dict[str, Any]):
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            ended = needed in ONE_SHOT
            assert how["condition"] == ("service_completed_successfully" if ended else "service_healthy")


def test_no_process_of_ours_starts_before_the_set_up(services: dict[str, Any]):
    for name in ["api", *WORKERS]:
        assert "setup" in services[name]["depends_on"]


# --- Secrets


def test_compose_refuses_to_start_without_any_one_of_the_secrets(raw: dict[str, Any], variables: dict[str, str]):
    for name in variables:
        incomplete = {other: value for other, value in variables.items() if other != name}

        with pytest.raises(VariableMissing, match=name):
            interpolate(raw, incomplete)


def test_no_variable_that_is_a_secret_has_a_default(raw: dict[str, Any]):
    with_default = re.findall(r"\$\{(\w+)(?!:\?)[:}-]", json.dumps(raw))

    assert not [name for name in with_default if SECRET_WORDS.search(name)]


@pytest.mark.parametrize("name", SERVICES)
def test_no_secret_is_written_into_the_file(services: dict[str, Any], name: str):
    for variable, value in services[name].get("environment", {}).items():
        if SECRET_WORDS.search(variable):
            assert "value-of-" in value or value == "not-used-by-flower"


def test_no_secret_is_on_a_command_line(services: dict[str, Any]):
    for service in services.values():
        assert "value-of-" not in json.dumps(service.get("command", ""))
        assert "value-of-" not in json.dumps(service.get("healthcheck", ""))


def test_the_example_environment_names_exactly_the_variables_that_the_file_reads(raw: dict[str, Any]):
    read = set(re.findall(r"\$\{(\w+)", json.dumps(raw)))
    example = (REPOSITORY / "infra/.env.example").read_text()
    named = set(re.findall(r"^#?([A-Z][A-Z0-9_]+)=", example, re.MULTILINE))

    assert named - {"COMPOSE_PROFILES"} == read


def test_the_example_environment_holds_no_secret(variables: dict[str, str]):
    example = (REPOSITORY / "infra/.env.example").read_text().splitlines()

    assert {f"{name}=" for name in variables} <= set(example)


def test_the_command_in_the_example_makes_an_environment_that_compose_takes(tmp_path: Path, raw: dict[str, Any]):
    example = REPOSITORY / "infra/.env.example"
    (tmp_path / "infra").mkdir()
    shutil.copy(example, tmp_path / "infra")
    (command,) = re.findall(r"^#   (.+)$", example.read_text(), re.MULTILINE)

    assert command in (REPOSITORY / "README.md").read_text()

    subprocess.run(command, shell=True, cwd=tmp_path, check=True)

    lines = [line for line in (tmp_path / ".env").read_text().splitlines() if line and line[0] != "#"]
    made = dict(line.split("=", 1) for line in lines)
    interpolate(raw, made)
    secrets = [value for name, value in made.items() if SECRET_WORDS.search(name)]
    assert len(set(secrets)) == len(secrets) >= 6
    assert all(re.fullmatch(r"[0-9a-f]{48}", secret) for secret in secrets)
    check_key(made["NOISEMILL_API_KEY"])


def test_the_environment_with_secrets_cannot_be_committed():
    ignored = subprocess.run(["git", "check-ignore", ".env"], cwd=REPOSITORY, capture_output=True, check=False)

    assert ignored.stdout.split() == [b".env"]


# --- The network


def test_only_what_clients_need_is_published(services: dict[str, Any]):
    published = {name for name, service in services.items() if service.get("ports")}

    # S3, because artifacts are fetched from it by presigned URLs.
    assert published == {"api", "flower", "s3", "prometheus"}


def test_every_published_port_is_on_the_loopback_by_default(services: dict[str, Any]):
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_what_holds_data_or_runs_models_cannot_reach_the_internet(compose: dict[str, Any]):
    assert compose["networks"]["inside"]["internal"] is True
    for name in ["postgres", "redis", "setup", *WORKERS]:
        assert compose["services"][name]["networks"] == ["inside"]


# --- The same commands and settings as the local stack


@pytest.fixture
def local() -> dict[str, Any]:
    """The local stack's commands by service, told in compose's places."""
    s3 = S3Access(endpoint="", bucket="", access_key="", secret_key="")
    access = {"api_key": "", "flower_password": "secret", "database_url": "", "broker_url": ""}
    wiring = Wiring(api_port=8000, flower_port=5555, s3=s3, cache=Path(), **access)
    stack = noisemill_services(wiring)
    commands = {re.sub(r"-\d+$", "", part.name): part for part in stack.parts}
    return {"setup": list(stack.setup), **{name: list(part.argv) for name, part in commands.items()}, "parts": commands}


def told_for_containers(argv: list[str]) -> list[str]:
    """``argv`` with the interpreter, address and node name that differ in a container."""
    text = [word.replace("127.0.0.1", "0.0.0.0") for word in argv[1:]]
    return ["python", *(re.sub(r"^(worker-\w+)-\d+@", r"\1@", word) for word in text)]


@pytest.mark.parametrize("name", OURS)
def test_a_container_runs_the_command_of_the_local_stack(services: dict[str, Any], local: dict[str, Any], name: str):
    assert services[name]["command"] == told_for_containers(local[name.removesuffix("-gpu")])


def test_flower_is_behind_a_password_as_in_the_local_stack(services: dict[str, Any], local: dict[str, Any]):
    user = local["parts"]["flower"].env["FLOWER_BASIC_AUTH"].partition(":")[0]

    assert services["flower"]["environment"]["FLOWER_BASIC_AUTH"] == f"{user}:value-of-flower-password"
    assert "FLOWER_UNAUTHENTICATED_API" not in services["flower"]["environment"]


@pytest.mark.parametrize("name", OURS)
def test_the_settings_of_a_container_can_be_read(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str):
    for variable, value in services[name]["environment"].items():
        monkeypatch.setenv(variable, value)
        if variable.startswith("NOISEMILL_"):
            _, section, field = variable.lower().split("_", 2)
            assert field in Settings.model_fields[section].annotation.model_fields

    settings = Settings.read()

    assert settings.broker.url.get_secret_value() == "redis://:value-of-redis-password@redis:6379/0"


def test_only_the_set_up_knows_the_first_api_key(services: dict[str, Any]):
    knowing = [name for name, service in services.items() if "NOISEMILL_API_KEY" in service.get("environment", {})]

    assert knowing == ["setup"]


def test_flower_knows_neither_the_database_nor_the_storage(services: dict[str, Any]):
    told = json.dumps(services["flower"]["environment"])

    assert "value-of-postgres" not in told
    assert "value-of-s3" not in told


# --- Workers


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_is_given_the_time_to_hand_its_job_back(services: dict[str, Any], name: str):
    drain = Settings.model_fields["worker"].default.drain_grace

    assert seconds(services[name]["stop_grace_period"]) >= 45
    assert timedelta(seconds=seconds(services[name]["stop_grace_period"])) > drain
    assert services[name]["environment"]["REMAP_SIGTERM"] == "SIGQUIT"


@pytest.mark.parametrize("name", WORKERS)
def test_workers_can_be_multiplied(services: dict[str, Any], name: str):
    """``--scale`` fails on a fixed name or port, and two Celery nodes of one name would be one worker to Flower."""
    service = services[name]

    assert "container_name" not in service
    assert "ports" not in service
    assert service["command"][-1] == f"{service['environment']['NODE']}@%h"


def test_each_worker_has_scratch_space_of_its_own(services: dict[str, Any]):
    """What a dead worker left in a shared /tmp would stay for ever, and fill the disk of all."""
    for name in WORKERS:
        assert [volume for volume in services[name]["volumes"] if volume.endswith("/tmp")] == ["/tmp"]


def test_devices_are_reserved_by_the_gpu_profile_only(services: dict[str, Any]):
    for name in WORKERS:
        devices = services[name].get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices")

        assert services[name]["profiles"] == (["gpu"] if name.endswith("-gpu") else ["cpu"])
        assert (devices is not None) == name.endswith("-gpu")


@pytest.mark.parametrize("name", [name for name in WORKERS if name.endswith("-gpu")])
def test_each_gpu_worker_names_its_device(services: dict[str, Any], name: str):
    (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]

    assert device == {"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}


def test_all_queues_are_served_whatever_the_profile(services: dict[str, Any]):
    from shared.jobs.state import QUEUES

    for suffix in ("", "-gpu"):
        served = set()
        for kind in ("train", "generate"):
            command = services[f"worker-{kind}{suffix}"]["command"]
            served |= set(command[command.index("-Q") + 1].split(","))
        assert served == set(QUEUES.values())

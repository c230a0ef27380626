"""Settings: all of them documented, and the queue's exactly as measured (docs/reliability.md)."""

import importlib.util
import re
from typing import Any

import pytest
from pydantic import SecretStr

from shared.described import descriptions
from shared.queue import SETTINGS, make_celery
from shared.settings import BrokerSettings, Section, Settings
from shared.specs import FAMILIES as SPECS
from tests.architecture.conftest import REPOSITORY, Module

# Written out a second time on purpose: changing one of them must take two hands and a reason.
QUEUE = {
    "task_acks_late": False,
    "worker_prefetch_multiplier": 1,
    "worker_disable_prefetch": True,
    "task_ignore_result": True,
    "result_backend": None,
    "task_reject_on_worker_lost": False,
    "task_retry_on_worker_lost": False,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "task_serializer": "json",
    "result_serializer": "json",
    "accept_content": ["json"],
    "task_send_sent_event": False,
    "worker_soft_shutdown_timeout": 20.0,
    "worker_proc_alive_timeout": 120.0,
    "worker_pool": "prefork",
    "worker_pool_start_method": "spawn",
    "worker_concurrency": 1,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "worker_enable_remote_control": True,
}
TRANSPORT = {
    "visibility_timeout": 600,
    "unacked_restore_interval": 5,
    "unacked_restore_throttle": 1,
    "socket_timeout": 10,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 5,
    "global_keyprefix": "mine:",
}


@pytest.fixture(scope="module")
def conf() -> Any:
    return make_celery(BrokerSettings(url=SecretStr("redis://127.0.0.1:1/0"), prefix="mine:")).conf


@pytest.mark.parametrize("name", QUEUE)
def test_celery_is_set_as_measured(conf: Any, name: str):
    assert conf[name] == QUEUE[name]


@pytest.mark.parametrize("name", TRANSPORT)
def test_the_connection_to_the_broker_is_set_as_measured(conf: Any, name: str):
    assert conf.broker_transport_options[name] == TRANSPORT[name]


def test_the_worker_runs_with_these_settings(monkeypatch: pytest.MonkeyPatch):
    """Its app module must not change them on the way."""
    for name in ("DATABASE_URL", "BROKER_URL", "S3_ACCESS_KEY", "S3_SECRET_KEY"):
        monkeypatch.setenv(f"NOISEMILL_{name}", "redis://127.0.0.1:1/0")
    from worker.app import app

    assert {name: app.conf[name] for name in QUEUE} == QUEUE


@pytest.mark.parametrize(
    "name", sorted({*SETTINGS, *TRANSPORT} - {"task_default_queue", "task_create_missing_queues", "timezone"})
)
def test_the_reason_for_each_queue_setting_is_written_down(name: str):
    assert f"`{name}`" in (REPOSITORY / "docs/reliability.md").read_text()


@pytest.mark.parametrize("name", ["configuration", "performance", "quality"])
def test_a_generated_page_is_that_of_its_source(name: str):
    written = (REPOSITORY / f"docs/{name}.md").read_text("utf-8")

    assert written == script(name).render(), f"run: .venv/bin/python docs/{name}.py > docs/{name}.md"


def test_the_scores_of_each_family_are_those_that_were_recorded():
    page, quality = (REPOSITORY / "docs/models.md").read_text("utf-8"), script("quality")

    assert sorted(family for _, family, _ in quality.BLOCK.findall(page)) == sorted(SPECS)
    assert page == quality.scored(page), "run: .venv/bin/python docs/quality.py --scores"


def script(name: str) -> Any:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_setting_says_what_it_means():
    sections = [(name, field.annotation) for name, field in Settings.model_fields.items()]
    silent = [
        f"{name}.{field_name}"
        for name, section in sections
        if isinstance(section, type) and issubclass(section, Section)
        for field_name in section.model_fields.keys() - descriptions(section).keys()
    ]

    assert silent == []


def test_every_variable_that_is_written_somewhere_exists(modules: list[Module]):
    """In code, documents and deployment alike: a name nobody reads would be a promise broken."""
    page = (REPOSITORY / "docs/configuration.md").read_text()
    known = set(re.findall(r"NOISEMILL_[A-Z0-9_]+", page))
    texts = {module.path: module.text for module in modules}
    for pattern in ("*.md", "docs/**/*.md", "infra/**/*", "docker-compose.yml", "Makefile"):
        texts |= {str(path): path.read_text() for path in REPOSITORY.glob(pattern) if path.is_file()}

    unknown = {
        (place, name)
        for place, text in texts.items()
        for name in re.findall(r"\bNOISEMILL_[A-Z0-9_]+[A-Z0-9]", text)
        if name not in known and name != "NOISEMILL_VERSION"
    }

    assert unknown == set()

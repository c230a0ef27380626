"""The breaking networks, between real clients and real servers."""

from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import psycopg
import pytest
import redis

from noisemill.local.servers import Postgres
from tests.chaos.proxies import PostgresProxy, Proxy, ProxyLoop


@pytest.fixture
def loop() -> Iterator[ProxyLoop]:
    loop = ProxyLoop()
    yield loop
    loop.close()


@pytest.fixture
def valkey_proxy(loop: ProxyLoop, broker: str) -> Iterator[Proxy]:
    proxy = Proxy(loop, urlsplit(broker).port or 0)
    yield proxy
    proxy.close()


@pytest.fixture
def client(valkey_proxy: Proxy, broker: str) -> Iterator[Callable[[], redis.Redis]]:
    made: list[redis.Redis] = []

    def connect() -> redis.Redis:
        url = urlsplit(broker)
        made.append(
            redis.Redis(
                port=valkey_proxy.port,
                password=url.password,
                socket_timeout=0.5,
                retry=None,
                single_connection_client=False,
            )
        )
        return made[-1]

    yield connect
    for one in made:
        one.close()


def test_a_blind_network_swallows_and_keeps_old_and_new_connections_open(
    valkey_proxy: Proxy, client: Callable[[], redis.Redis]
) -> None:
    old = client()
    assert old.ping()

    valkey_proxy.go_blind()

    for connection in (old, client()):
        with pytest.raises(redis.TimeoutError):
            connection.ping()


def test_after_a_blindness_only_new_connections_are_carried(
    valkey_proxy: Proxy, client: Callable[[], redis.Redis]
) -> None:
    old = client()
    pubsub = old.pubsub()
    pubsub.subscribe("news")
    assert pubsub.get_message(timeout=2)
    valkey_proxy.go_blind()
    valkey_proxy.see_again()

    assert client().publish("news", "x") == 1
    assert pubsub.get_message(timeout=0.5) is None


def test_a_cut_is_seen_at_once_and_the_next_connection_works(
    valkey_proxy: Proxy, client: Callable[[], redis.Redis]
) -> None:
    connection = client()
    pubsub = connection.pubsub()
    pubsub.subscribe("news")
    assert pubsub.get_message(timeout=2)

    valkey_proxy.cut()

    with pytest.raises(redis.ConnectionError):
        pubsub.connection.read_response(disconnect_on_error=False)
    assert connection.ping()


@pytest.fixture
def lying(loop: ProxyLoop, postgres: Postgres) -> Iterator[PostgresProxy]:
    proxy = PostgresProxy(loop, postgres.port, seed=1)
    yield proxy
    proxy.close()


def test_a_commit_that_was_answered_by_a_broken_connection_happened_or_not_as_counted(
    lying: PostgresProxy, postgres: Postgres, empty_database: str
) -> None:
    direct = empty_database.replace("+psycopg", "")
    through = direct.replace(f":{postgres.port}/", f":{lying.port}/")
    with psycopg.connect(direct, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept (id int)")
    lying.lie_share = 0.5
    confirmed = 0
    for number in range(24):
        try:
            with psycopg.connect(through) as connection:
                connection.execute("INSERT INTO kept VALUES (%s)", (number,))
        except psycopg.OperationalError:
            continue
        confirmed += 1

    with psycopg.connect(direct) as connection:
        kept = connection.execute("SELECT count(*) FROM kept").fetchone()
    assert min(confirmed, lying.lies["executed"], lying.lies["dropped"]) > 0
    assert sum(lying.lies.values()) + confirmed == 24
    assert kept == (confirmed + lying.lies["executed"],)

"""``python -m tests.model``: the page ``docs/model-check.md``; with names from ``sizes.py``, only how big those are."""

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection

from noisemill.local.ports import free_port
from noisemill.local.servers import Postgres
from shared.migrations import migrate
from tests.conftest import _running as running
from tests.model import sizes
from tests.model.page import page
from tests.model.prepared import prepared
from tests.model.search import searching


@contextmanager
def fresh_connection() -> Iterator[Connection]:
    with tempfile.TemporaryDirectory(prefix="noisemill-model-") as folder:
        server = Postgres(folder=Path(folder) / "postgres", port=free_port(), password="model", durable=False)
        with running(server, Path(folder)):
            migrate(server.url_of("postgres"))
            with prepared(server.url_of("postgres")) as connection:
                yield connection


def main() -> None:
    with fresh_connection() as connection:
        if not sys.argv[1:]:
            for line in page(connection):
                print(line, flush=True)
        for name in sys.argv[1:]:
            began, cpu = time.monotonic(), time.process_time()
            with searching(connection, getattr(sizes, name.upper())) as search:
                print(name, search.run())
            print(f"{time.monotonic() - began:.1f} s, {time.process_time() - cpu:.1f} s of CPU")


if __name__ == "__main__":
    main()

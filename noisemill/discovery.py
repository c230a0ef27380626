"""Where the server is: given, from the environment, or the nearest running local stack."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from noisemill.errors import ServerUnreachable

FOLDER: Final = ".noisemill"
"""Name of a local stack's data folder."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """An address and the key to use there."""

    url: str
    api_key: str | None

    def __repr__(self) -> str:
        return f"Server(url={self.url!r})"  # a key must not end up in a traceback


def find_server(url: str | None = None, api_key: str | None = None) -> Server:
    """Resolve what was not given: NOISEMILL_URL and NOISEMILL_API_KEY, then the nearest running stack.

    The key of a local stack is used for that stack's own address only.

    Raises:
        ServerUnreachable: no address is known.
    """
    url = url or os.environ.get("NOISEMILL_URL")
    api_key = api_key or os.environ.get("NOISEMILL_API_KEY")
    if url and api_key:
        return Server(url=_clean(url), api_key=api_key)
    stacks = list(_running_stacks())
    if url is None and not stacks:
        raise ServerUnreachable("No server is known: start one with `noisemill up`, or set NOISEMILL_URL.")
    url = _clean(url or stacks[0]["api_url"])
    keys = (stack["api_key"] for stack in stacks if _clean(stack["api_url"]) == url)
    return Server(url=url, api_key=api_key or next(keys, None))


def default_data_dir() -> Path:
    """The data folder that commands without ``--data-dir`` mean: the nearest one, else the home's."""
    return next((folder for folder in _candidates() if folder.is_dir()), Path.home() / FOLDER)


def _candidates() -> Iterator[Path]:
    here = Path.cwd()
    for parent in [here, *here.parents, Path.home()]:
        yield parent / FOLDER


def _running_stacks() -> Iterator[dict[str, Any]]:
    for folder in _candidates():
        try:
            stack = json.loads((folder / "stack.json").read_text())
            if _is_running(stack["pids"]["api"]) and stack["api_url"] and "api_key" in stack:
                yield stack
        except (OSError, ValueError, LookupError, TypeError):
            continue  # none there, unreadable, or half a file: not a running stack


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _clean(url: str) -> str:
    return (url if "://" in url else f"http://{url}").rstrip("/")

"""The end of the supervisor is the end of its runner and of all that this started, whatever they do just then.

The supervisor alone holds one end of a pipe. At the other waits a process of the runner's group, which kills the group
when the pipe ends: also while a library keeps the interpreter's lock, or when the runner is stopped.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_WATCH: Final = ("/bin/sh", "-c", "read -r _; kill -9 0")
"""Waits for the end of what it reads; 0 is its own process group. Takes a megabyte, where Python takes ten."""


@contextmanager
def ending_with(fd: int) -> Iterator[None]:
    """Have this process group killed when the pipe ends whose file descriptor is ``fd``, which is closed here."""
    with subprocess.Popen(_WATCH, stdin=fd, stdout=subprocess.DEVNULL) as watch:
        os.close(fd)
        try:
            yield
        finally:
            watch.kill()

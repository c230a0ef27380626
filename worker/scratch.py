"""A folder for what runners write in passing: checkpoints and weights on their way up, datasets in the making.

A runner that is killed leaves it behind, whole datasets at a time. Each supervisor has a folder of its own below the
cache, emptied before each runner that it starts; those of supervisors that are dead go when the next one starts.
"""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path


class Scratch:
    """One supervisor's folder, locked for as long as the process lives: by that others see whose it is.

    Names would not do: a worker that comes back in another container has another one.

    Raises:
        OSError: there can be no such folder.
    """

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        for folder in parent.iterdir():
            if (lock := _locked(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
        while True:
            self.folder = Path(tempfile.mkdtemp(dir=parent))
            self._lock = _locked(self.folder)
            # Between its making and its locking another supervisor may have taken it for left behind.
            if self._lock is not None and self.folder.exists():
                return

    def empty(self) -> None:
        """Remove what is in it; nobody may be using that."""
        for entry in os.scandir(self.folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink(missing_ok=True)


def _locked(folder: Path) -> int | None:
    """A descriptor by which the folder is locked; None if somebody else has it, or it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor

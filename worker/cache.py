"""Downloaded inputs, by digest, shared by every runner on the machine and kept under a size.

A file appears whole and verified, or not at all; its name is its SHA-256, so it never goes stale.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from shared.storage import Storage
from worker.run import StoredObject


class ObjectCache:
    """A folder of verified objects; the least recently used go first."""

    def __init__(self, folder: Path, storage: Storage, *, limit_bytes: int) -> None:
        self._folder = folder.expanduser()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._storage = storage
        self._limit = limit_bytes

    def fetch(self, stored: StoredObject, *, moved: Callable[[], None]) -> Path:
        """The object as a local file; ``moved`` is called again and again while its bytes come.

        Raises:
            StorageError: it is missing, damaged, or storage is away.
            OSError: the disk is full, or does not work.
        """
        path = self._folder / stored.sha256
        with suppress(FileNotFoundError):  # others make room in the folder, too
            if path.stat().st_size == stored.size_bytes:
                os.utime(path)
                return path
        self._make_room(stored.size_bytes)
        self._storage.download(stored.key, path, sha256=stored.sha256, moved=moved)
        return path

    def _files(self) -> Iterator[tuple[os.stat_result, Path]]:
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):
                if entry.is_file():
                    yield entry.stat(), Path(entry.path)

    def _make_room(self, size_bytes: int) -> None:
        files = list(self._files())
        used = sum(stat.st_size for stat, _ in files)
        in_use_since = time.time() - 60
        for stat, path in sorted(files, key=lambda item: item[0].st_mtime):
            if used + size_bytes <= self._limit or stat.st_mtime > in_use_since:
                return
            # Who has the file open or mapped keeps it: unlinking removes only the name.
            path.unlink(missing_ok=True)
            used -= stat.st_size

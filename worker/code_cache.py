"""Code that was compiled for networks on this machine: a folder for each kind of network, kept under a size.

What a compiler keeps is executed when it is read again. So it never comes from storage or over the network, nobody else
may have written it, and it is used as it was when it was sealed or not at all.
"""

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

SEAL: Final = "sealed.json"
"""The digest of each file of a folder; without it the folder was never finished."""


class UnsafeFolder(OSError):
    """Somebody else could have put code there."""


class CodeCache:
    """Folders of compiled code, by name; those unused for longest go first."""

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder.expanduser(), limit_bytes

    @contextmanager
    def opened(self, name: str, *, alone: bool, waits: bool = True) -> Iterator[Path]:
        """The folder of this name, empty if it is new. Who is ``alone`` may write; many may read at one time.

        Raises:
            BlockingIOError: somebody writes there, or reads what was to be written; unless it ``waits``.
            UnsafeFolder: others than this user may write there.
            OSError: the disk does not work.
        """
        self._make_own()
        path = self.folder / name
        while True:
            path.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if waits else fcntl.LOCK_NB))
                if _is_still(path, descriptor):  # others make room, too
                    os.utime(path)
                    yield path
                    return
            finally:
                os.close(descriptor)

    def _make_own(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = self.folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
            raise UnsafeFolder(f"{self.folder} is not a folder of this user")
        if about.st_mode & 0o077:
            # It was open to others: what it holds may be theirs.
            for entry in self.folder.iterdir():
                _remove(entry)
            self.folder.chmod(0o700)

    def make_room(self, *, but: str) -> None:
        """Remove the folders unused for longest, but one and those in use, until the rest is within the limit."""
        found = sorted((one.lstat().st_mtime, one.name, _size(one)) for one in self.folder.iterdir())
        used = sum(size for _, _, size in found)
        for _, name, size in found:
            if used <= self.limit_bytes:
                return
            if name != but and _removed_unused(self.folder / name):
                used -= size


def seal(folder: Path) -> None:
    """Say that what is in a folder is whole."""
    digests = {str(path.relative_to(folder)): _digest(path) for path in _files(folder)}
    unfinished = folder / f".{SEAL}"
    unfinished.write_text(json.dumps({"files": digests}), "utf-8")
    unfinished.replace(folder / SEAL)


def is_whole(folder: Path) -> bool:
    """Whether a folder was sealed, and every file is what it was then. What has come in since is removed."""
    try:
        digests = json.loads((folder / SEAL).read_text("utf-8"))["files"]
        found = {str(path.relative_to(folder)): path for path in _files(folder)}
        for name in found.keys() - digests.keys():
            found[name].unlink()
        return all(_digest(found[name]) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def clear(folder: Path) -> None:
    """Remove what is in a folder."""
    for entry in folder.iterdir():
        _remove(entry)


def _files(folder: Path) -> Iterator[Path]:
    """All but the seal; a link is no file, and what it points to is not looked at."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or (path.is_file() and path.name not in (SEAL, f".{SEAL}")):
            yield path


def _digest(path: Path) -> str:
    if path.is_symlink():
        return "a link"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += 0 if path.is_dir() else path.lstat().st_size
    return total


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _removed_unused(path: Path) -> bool:
    """Remove a folder unless somebody holds it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        _remove(path)  # no folder, so none of ours
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

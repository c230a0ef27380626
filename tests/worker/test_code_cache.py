"""Compiled code is executed when it is read: only what this user sealed is, and only as it was then."""

import os
import threading
from pathlib import Path

import pytest

from worker.code_cache import SEAL, CodeCache, UnsafeFolder, clear, is_whole, seal


@pytest.fixture
def cache(tmp_path: Path) -> CodeCache:
    return CodeCache(tmp_path / "code", limit_bytes=10_000)


def filled(cache: CodeCache, name: str, size: int = 100) -> Path:
    with cache.opened(name, alone=True) as folder:
        (folder / "ab").mkdir(exist_ok=True)
        (folder / "ab" / "kernel.so").write_bytes(b"x" * size)
        seal(folder)
    return folder


def test_what_was_sealed_is_found_whole_by_another_process_or_a_later_one(cache: CodeCache):
    filled(cache, "net")

    with CodeCache(cache.folder, limit_bytes=10_000).opened("net", alone=False) as folder:
        assert is_whole(folder)


def test_a_folder_that_was_never_finished_is_not_whole(cache: CodeCache):
    with cache.opened("net", alone=True) as folder:
        (folder / "kernel.so").write_bytes(b"half")

    assert not is_whole(folder)


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "linked", "seal"])
def test_a_folder_that_is_not_what_was_sealed_is_not_whole(cache: CodeCache, tmp_path: Path, damage: str):
    folder = filled(cache, "net")
    file = folder / "ab" / "kernel.so"
    match damage:
        case "changed":
            file.write_bytes(b"y" * 100)
        case "cut":
            file.write_bytes(b"x" * 99)
        case "gone":
            file.unlink()
        case "linked":
            (tmp_path / "same").write_bytes(file.read_bytes())
            file.unlink()
            file.symlink_to(tmp_path / "same")
        case _:
            (folder / SEAL).write_text("{}")

    assert not is_whole(folder)


def test_what_came_in_after_the_seal_is_removed(cache: CodeCache):
    folder = filled(cache, "net")
    (folder / "ab" / "foreign.so").write_bytes(b"z")
    (folder / "link").symlink_to("/etc")

    assert is_whole(folder)
    assert sorted(path.name for path in folder.rglob("*")) == ["ab", "kernel.so", SEAL]


def test_only_this_user_may_look_into_it(cache: CodeCache):
    folder = filled(cache, "net")

    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_was_open_to_others_is_emptied(cache: CodeCache):
    filled(cache, "net")
    cache.folder.chmod(0o777)

    with cache.opened("net", alone=False) as folder:
        assert list(folder.iterdir()) == []
    assert cache.folder.stat().st_mode & 0o777 == 0o700


def test_a_link_to_a_folder_of_somebody_s_is_refused(cache: CodeCache, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.folder.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(UnsafeFolder), cache.opened("net", alone=False):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(cache: CodeCache):
    cache.folder.mkdir(mode=0o700)
    os.chown(cache.folder, 12345, -1)

    with pytest.raises(UnsafeFolder), cache.opened("net", alone=False):
        pass


def test_those_unused_for_longest_go_first(cache: CodeCache):
    for age, name in enumerate(("newest", "middle", "oldest")):
        os.utime(filled(cache, name, size=4_000), (1000 - age, 1000 - age))

    cache.make_room(but="newest")

    assert sorted(path.name for path in cache.folder.iterdir()) == ["middle", "newest"]


def test_one_that_is_in_use_stays(cache: CodeCache):
    for name in ("kept", "used"):
        filled(cache, name, size=9_000)

    with cache.opened("used", alone=False):
        cache.make_room(but="kept")
        assert (cache.folder / "used" / SEAL).exists()


def test_who_writes_is_alone(cache: CodeCache):
    """A second one that would compile the same waits, and finds it done."""
    found: list[bool] = []

    def second() -> None:
        with cache.opened("net", alone=True) as folder:
            found.append(is_whole(folder))

    with cache.opened("net", alone=True) as folder:
        waiting = threading.Thread(target=second)
        waiting.start()
        (folder / "kernel.so").write_bytes(b"x")
        seal(folder)
        assert found == []
    waiting.join()

    assert found == [True]


def test_who_does_not_wait_is_told_that_somebody_writes(cache: CodeCache):
    with (
        cache.opened("net", alone=True),
        pytest.raises(BlockingIOError),
        cache.opened("net", alone=False, waits=False),
    ):
        pass


def test_what_is_cleared_is_empty_and_stays_the_same_folder(cache: CodeCache):
    folder = filled(cache, "net")
    before = folder.stat().st_ino

    clear(folder)

    assert list(folder.iterdir()) == []
    assert folder.stat().st_ino == before

"""Whatever happens to the bytes of an upload, the worst that comes of it is a named refusal."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shared.errors import DatasetInvalid
from tests.data.making import npz, tarred, wav, zipped
from worker.data.progress import Progress
from worker.data.upload import Wanted, convert

TEXTS = {"a.txt": b"hello" * 50, "x" * 150 + ".jsonl": b'{"text": "x"}\n'}
UPLOADS = {
    "npz": npz(images=np.arange(192, dtype=np.uint8).reshape(3, 8, 8), labels=np.arange(3)),
    "zip": zipped(TEXTS),
    "stored zip": zipped({"a.wav": wav([1, 2, 3])}, compression=0),
    "tar": tarred(TEXTS),
    "tar.gz": tarred(TEXTS, compression="gz"),
    "tar.bz2": tarred(TEXTS, compression="bz2"),
    "tar.xz": tarred(TEXTS, compression="xz"),
}
ROUNDS = 250


class Silent:
    """Progress that nobody looks at."""

    def phase(self, name: str) -> None: ...

    def step(self, step: int, steps: int, **values: float) -> None: ...


def damaged(content: bytes, rng: random.Random) -> Iterator[bytes]:
    for _ in range(ROUNDS):
        copy = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(len(copy))
            match rng.randrange(6):
                case 0:
                    del copy[at : at + rng.randrange(1, 20)]
                case 1:
                    copy[at:at] = rng.randbytes(rng.randrange(1, 8))
                case _:
                    copy[at] = rng.choice([0, 255, rng.randrange(256)])
        yield bytes(copy)


@pytest.mark.parametrize("kind", UPLOADS)
def test_random_damage_is_refused_or_harmless(tmp_path: Path, kind: str) -> None:
    for number, content in enumerate(damaged(UPLOADS[kind], random.Random(1))):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        (scratch / "upload").write_bytes(content)

        with contextlib.suppress(DatasetInvalid):
            convert(scratch / "upload", "a.zip", scratch, Wanted(), Progress(Silent()))


def test_a_member_without_a_name_is_refused(tmp_path: Path) -> None:
    content = zipped({"a": b"1"}, compression=0)
    local, central = content.index(b"a1"), content.rindex(b"a")
    nameless = bytearray(content[:local] + content[local + 1 : central] + content[central + 1 :])
    nameless[26] = 0
    directory = nameless.index(b"PK\x01\x02")
    nameless[directory + 28] = 0
    end = nameless.index(b"PK\x05\x06")
    nameless[end + 12] -= 1
    nameless[end + 16] -= 1
    (tmp_path / "upload").write_bytes(nameless)

    with pytest.raises(DatasetInvalid, match="the name is empty"):
        convert(tmp_path / "upload", "a.zip", tmp_path, Wanted(), Progress(Silent()))

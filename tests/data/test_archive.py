"""What an archive may do to us: nothing. Every refusal names the member and the reason."""

import bz2
import gzip
import io
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import DatasetInvalid
from tests.data.making import greys, special, tar_of, tarred, zipped
from worker.data.archive import Limits, read_members

SMALL = Limits(members=100, member_bytes=1 << 20, total_bytes=2 << 20, ratio=50, ratio_floor_bytes=1 << 16)
MEBIBYTE = bytes(1 << 20)
TEXT = b"some text " * 1000


def contents(path: Path, archive: bytes, limits: Limits = SMALL) -> dict[str, bytes]:
    path = path / "upload"
    path.write_bytes(archive)
    return {member.name: b"".join(member.chunks()) for member in read_members(path, limits)}


def zip_entry(name: str, *, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def zip_of(*entries: zipfile.ZipInfo) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for info in entries:
            archive.writestr(info, b"content")
    return buffer.getvalue()


def encrypted_zip() -> bytes:
    archive = bytearray(zipped({"secret.png": b"content"}))
    archive[6] |= 1
    archive[archive.index(b"PK\x01\x02") + 8] |= 1
    return bytes(archive)


def zip_that_understates() -> bytes:
    """A bomb whose headers declare a size of 10 bytes."""
    archive = zipped({"bomb.png": MEBIBYTE})
    return archive.replace(struct.pack("<I", 1 << 20), struct.pack("<I", 10))


def zip_with_nul() -> bytes:
    return zipped({"a.png_.exe": b"content"}).replace(b"a.png_", b"a.png\0")


def zip_with_twins() -> bytes:
    return zipped({"a.png": b"1", "b.png": b"2"}).replace(b"b.png", b"a.png")


def tar_with_huge_extension() -> bytes:
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {"comment": "x" * (1 << 20)}
    return tar_of([(info, b"")], format=tarfile.PAX_FORMAT)


def tar_with_negative_size() -> bytes:
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def damaged_gzip() -> bytes:
    archive = bytearray(gzip.compress(tarred({"a.txt": TEXT})))
    archive[-8] ^= 1
    return bytes(archive)


def damaged_zip() -> bytes:
    archive = bytearray(zipped({"a.txt": TEXT}, compression=zipfile.ZIP_STORED))
    archive[200] ^= 1
    return bytes(archive)


ABSOLUTE, CLIMBS, DRIVE = "absolute paths", "climbs out", "drive letters"

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "zip: bomb": (lambda: zipped({"bomb.png": MEBIBYTE}), "'bomb.png'.*bomb: unpacks to more than 50 times"),
    "zip: bomb that understates": (zip_that_understates, "'bomb.png'"),
    "zip: bomb in many members": (
        lambda: zipped({f"{i}.png": bytes(50_000) for i in range(40)}),
        r"'\d+.png'.*bomb: the archive unpacks to more than 50 times",
    ),
    "zip: zip in zip": (lambda: zipped({"inner.zip": zipped({"bomb.png": MEBIBYTE})}), "'inner.zip'.*inside"),
    "zip: gzip in zip": (lambda: zipped({"inner.png": gzip.compress(MEBIBYTE)}), "'inner.png'.*inside archives"),
    "zip: too many members": (lambda: zipped({f"{i}.png": b"" for i in range(101)}), "more than 100 members"),
    "zip: large member": (
        lambda: zipped({"large.png": MEBIBYTE + b"!"}, compression=zipfile.ZIP_STORED),
        "'large.png'.*larger than 1048576 bytes",
    ),
    "zip: large whole": (
        lambda: zipped({f"{i}.png": MEBIBYTE for i in range(3)}, compression=zipfile.ZIP_STORED),
        "'2.png'.*the archive holds more than 2097152 bytes",
    ),
    "zip: climbs": (lambda: zipped({"a/../../evil.png": b"x"}), f"'a/../../evil.png'.*{CLIMBS}"),
    "zip: climbs with backslashes": (lambda: zipped({"a\\..\\..\\evil.png": b"x"}), f"evil.png'.*{CLIMBS}"),
    "zip: absolute": (lambda: zipped({"/etc/passwd": b"x"}), f"'/etc/passwd'.*{ABSOLUTE}"),
    "zip: drive": (lambda: zipped({"C:\\evil.png": b"x"}), f"evil.png'.*{DRIVE}"),
    "zip: NUL": (zip_with_nul, "NUL"),
    "zip: same name twice": (zip_with_twins, "'a.png'.*twice"),
    "zip: link": (lambda: zip_of(zip_entry("l.png", mode=stat.S_IFLNK | 0o777)), "'l.png'.*links"),
    "zip: device": (lambda: zip_of(zip_entry("d.png", mode=stat.S_IFCHR)), "'d.png'.*special files"),
    "zip: encrypted": (encrypted_zip, "'secret.png': encrypted$"),
    "zip: unusual compression": (
        lambda: zipped({"a.png": TEXT}, compression=zipfile.ZIP_LZMA),
        "'a.png'.*compression method 14",
    ),
    "zip: truncated": (lambda: zipped({"a.txt": TEXT})[:-30], "zip is truncated or damaged"),
    "zip: damaged": (damaged_zip, "'a.txt'.*damaged.*CRC"),
    "tar: climbs": (lambda: tarred({"../evil.png": b"x"}), f"'../evil.png'.*{CLIMBS}"),
    "tar: absolute": (lambda: tarred({"/etc/passwd": b"x"}), f"'/etc/passwd'.*{ABSOLUTE}"),
    "tar: symbolic link": (
        lambda: tar_of([(special("l.png", tarfile.SYMTYPE, "/etc/passwd"), b"")]),
        "'l.png'.*links are not allowed",
    ),
    "tar: hard link": (
        lambda: tar_of([(special("h.png", tarfile.LNKTYPE, "a.png"), b"")]),
        "'h.png'.*hard links are not allowed",
    ),
    "tar: link with a long name": (
        lambda: tar_of([(special("l" * 200, tarfile.SYMTYPE, "/" + "t" * 200), b"")], format=tarfile.GNU_FORMAT),
        "'lll.*links are not allowed",
    ),
    "tar: device": (lambda: tar_of([(special("d.png", tarfile.CHRTYPE), b"")]), "'d.png'.*devices"),
    "tar: FIFO": (lambda: tar_of([(special("f.png", tarfile.FIFOTYPE), b"")]), "'f.png'.*FIFO"),
    "tar: same name twice": (lambda: tarred({"a.png": b"1", "./a.png": b"2"}), "'a.png'.*twice"),
    "tar: too many members": (lambda: tarred({f"{i}.png": b"" for i in range(101)}), "more than 100 members"),
    "tar: bomb": (lambda: tarred({"bomb.png": MEBIBYTE}, compression="gz"), "'bomb.png'.*bomb"),
    "tar: bomb of bzip2": (lambda: tarred({"bomb.png": MEBIBYTE}, compression="bz2"), "'bomb.png'.*bomb"),
    "tar: bomb of xz": (lambda: tarred({"bomb.png": MEBIBYTE}, compression="xz"), "'bomb.png'.*bomb"),
    "tar: bomb behind the end": (lambda: gzip.compress(tarred({"a.png": b"x"}) + MEBIBYTE), "bomb"),
    "tar: tar in tar": (lambda: tarred({"inner.tar": tarred({"a.png": b""})}), "'inner.tar'.*inside archives"),
    "tar: huge extended header": (tar_with_huge_extension, "extended header is larger than 65536"),
    "tar: negative size": (tar_with_negative_size, "'a.png'.*negative"),
    "tar: truncated": (lambda: tarred({"a.txt": TEXT})[:4000], r"'a.txt'.*truncated: \d+ of 10000 bytes"),
    "tar: truncated between members": (lambda: tarred({"a.txt": TEXT})[:10752], "truncated"),
    "tar.gz: truncated": (lambda: tarred({"a.txt": TEXT}, compression="gz")[:-20], "truncated"),
    "tar.xz: truncated": (lambda: tarred({"a.txt": TEXT}, compression="xz")[:-40], "truncated"),
    "tar.gz: damaged": (damaged_gzip, "damaged.*CRC"),
    "gzip without tar": (lambda: gzip.compress(TEXT), "not a tar archive"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, message = HOSTILE[case]

    with pytest.raises(DatasetInvalid, match=message):
        contents(tmp_path, make())


PACKINGS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "zip": zipped,
    "stored zip": lambda files: zipped(files, compression=zipfile.ZIP_STORED),
    "tar": tarred,
    "tar.gz": lambda files: tarred(files, compression="gz"),
    "tar.bz2": lambda files: tarred(files, compression="bz2"),
    "tar.xz": lambda files: tarred(files, compression="xz"),
    "pax tar": lambda files: tar_of(
        ((tarfile.TarInfo(name), content) for name, content in files.items()), format=tarfile.PAX_FORMAT
    ),
    "GNU tar": lambda files: tar_of(
        ((tarfile.TarInfo(name), content) for name, content in files.items()), format=tarfile.GNU_FORMAT
    ),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_gives_back_what_was_packed(packing: str, tmp_path: Path) -> None:
    files = {"a/ä.png": greys(1)[0], "long/" + "x" * 200 + ".png": b"y" * 70_000, "empty": b"", "b.txt": TEXT}

    assert contents(tmp_path, PACKINGS[packing](files), Limits()) == files


def test_a_member_that_nobody_reads_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(tarred({"a.txt": TEXT, "b.txt": b"b"}))

    assert [member.name for member in read_members(tmp_path / "upload")] == ["a.txt", "b.txt"]


def test_folders_are_not_members(tmp_path: Path) -> None:
    folder = special("./cats", tarfile.DIRTYPE)

    assert contents(tmp_path, tar_of([(folder, b""), (tarfile.TarInfo("./cats/a.txt"), b"a")])) == {"cats/a.txt": b"a"}


def test_a_directory_of_a_hundred_thousand_entries_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    archive = zipped({f"{number}": b"" for number in range(100_000)}, compression=zipfile.ZIP_STORED)

    with pytest.raises(DatasetInvalid, match="more than 50000 members"):
        contents(tmp_path, archive, Limits(members=50_000))


def test_what_is_small_may_compress_well(tmp_path: Path) -> None:
    black = bytes(60_000)

    assert contents(tmp_path, zipped({"black.raw": black})) == {"black.raw": black}


def test_an_xz_that_asks_for_gigabytes_is_refused(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
    archive = bytearray(lzma.compress(tarred({"a.txt": TEXT}), filters=filters))
    # Bytes 12 to 23 are the block header; its dictionary size sits before the padding, its CRC at the end.
    header = archive[12:20]
    header[4] = 39
    archive[12:24] = bytes(header) + struct.pack("<I", zlib.crc32(header))

    with pytest.raises(DatasetInvalid, match=r"damaged.*[Mm]emory"):
        contents(tmp_path, bytes(archive))


def test_bzip2_in_a_zip_is_an_archive_in_an_archive(tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid, match=r"'a\.png'.*inside archives"):
        contents(tmp_path, zipped({"a.png": bz2.compress(TEXT)}))

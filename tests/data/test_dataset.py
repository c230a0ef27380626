"""Canonical datasets: shards are invisible, the split follows the content, and damaged files are refused."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import DatasetInvalid
from worker.data.dataset import HELD_OUT, TRAIN, open_images, open_text
from worker.data.writing import Annotations, ArrayFile, Canonical, ImageWriter, sorted_classes, split_by_content

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 3, 4, 5), dtype=np.uint8)
LOW, HIGH = 7, 2**63


def written(folder: Path, images: Any = IMAGES, *, per_shard: int = 4, labels: Any = None) -> Canonical:
    folder.mkdir(exist_ok=True)
    with ImageWriter(folder, (3, 4, 5), shard_bytes=per_shard * 60) as writer:
        for image in images:
            writer.add(image)
        return writer.finish(Annotations(labels=labels), {})


@pytest.mark.parametrize("per_shard", [1, 4, 23, 100])
def test_gather_takes_images_across_shards_in_any_order(tmp_path: Path, per_shard: int) -> None:
    dataset = open_images(written(tmp_path, per_shard=per_shard).files)
    order = np.random.default_rng(1).permutation(23)

    assert len(dataset.shards) == -(-23 // per_shard)
    assert np.array_equal(dataset.gather([*order, 5, 5]), IMAGES[[*order, 5, 5]])


def test_gather_of_nothing_is_an_empty_batch(tmp_path: Path) -> None:
    assert open_images(written(tmp_path).files).gather([]).shape == (0, 3, 4, 5)


@pytest.mark.parametrize("index", [-1, 23])
def test_gather_refuses_an_index_that_is_not_there(tmp_path: Path, index: int) -> None:
    with pytest.raises(IndexError):
        open_images(written(tmp_path, per_shard=100).files).gather([0, index])


def test_the_sides_of_the_split_are_apart_and_complete(tmp_path: Path) -> None:
    dataset = open_images(written(tmp_path).files)

    assert sorted([*dataset.train_indices, *dataset.held_out_indices]) == list(range(23))
    assert len(dataset.train_indices) and len(dataset.held_out_indices)


def test_about_a_tenth_is_held_out(tmp_path: Path) -> None:
    images = np.random.default_rng(2).integers(0, 256, (3000, 3, 4, 5), dtype=np.uint8)

    held_out = len(open_images(written(tmp_path, images, per_shard=3000).files).held_out_indices)

    assert 240 < held_out < 360


def test_equal_samples_are_on_the_same_side(tmp_path: Path) -> None:
    dataset = open_images(written(tmp_path, np.concatenate([IMAGES, IMAGES[::-1]])).files)

    assert np.array_equal(dataset.split[:23], dataset.split[23:][::-1])


def test_a_sample_keeps_its_side_when_others_come_and_go(tmp_path: Path) -> None:
    many = np.random.default_rng(3).integers(0, 256, (200, 3, 4, 5), dtype=np.uint8)

    all_of_them = open_images(written(tmp_path / "all", many).files).split
    every_second = open_images(written(tmp_path / "half", many[::2]).files).split

    assert np.array_equal(all_of_them[::2], every_second)


SPLITS: dict[str, tuple[list[int], list[int]]] = {
    "one low": ([LOW], [TRAIN]),
    "one high": ([HIGH], [TRAIN]),
    "all equal": ([LOW, LOW], [TRAIN, TRAIN]),
    "none low": ([HIGH + 1, HIGH, HIGH + 1, HIGH], [TRAIN, HELD_OUT, TRAIN, HELD_OUT]),
    "all low": ([LOW, LOW + 1, LOW + 1], [HELD_OUT, TRAIN, TRAIN]),
    "both": ([LOW, HIGH, HIGH + 1], [HELD_OUT, TRAIN, TRAIN]),
}


@pytest.mark.parametrize("keys", SPLITS)
def test_both_sides_have_samples_unless_all_are_equal(keys: str) -> None:
    given, expected = SPLITS[keys]

    assert split_by_content(given).tolist() == expected


def test_labels_are_ranks_of_sorted_classes(tmp_path: Path) -> None:
    canonical = written(tmp_path, IMAGES[:3], labels=["dog", "cat", "dog"])

    dataset = open_images(canonical.files)
    assert dataset.labels is not None and dataset.labels.tolist() == [1, 0, 1]
    assert dataset.num_classes == 2 and canonical.info["classes"] == ["cat", "dog"]


def test_numbers_sort_as_numbers() -> None:
    assert sorted_classes(["10", "9", "1"]) == ["1", "9", "10"]
    assert sorted_classes(["10", "9", "a"]) == ["10", "9", "a"]


def test_an_array_file_grows_to_any_length(tmp_path: Path) -> None:
    file = ArrayFile(tmp_path / "a.npy", np.int16, (2,))
    for number in range(1001):
        file.append(np.array([[number, -number]]))
    file.close()

    array = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert array.shape == (1001, 2) and array[1000].tolist() == [1000, -1000]


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid, match="no samples"):
        written(tmp_path, [])


def replace_with(name: str, array: Any) -> Callable[[dict[str, Path]], None]:
    return lambda files: np.save(files[name], array)


def cut(name: str) -> Callable[[dict[str, Path]], None]:
    return lambda files: os.truncate(files[name], files[name].stat().st_size - 1)


DAMAGES: dict[str, tuple[Callable[[dict[str, Path]], Any], str]] = {
    "shard missing": (lambda files: files.pop("images-00002.npy"), "images-00002.npy is missing"),
    "no shards": (lambda files: [files.pop(name) for name in list(files) if "images" in name], "images-00000.npy is"),
    "split missing": (lambda files: files.pop("split.npy"), "split.npy is missing"),
    "shard cut": (cut("images-00001.npy"), "images-00001.npy"),
    "shard of another shape": (replace_with("images-00001.npy", IMAGES[:4, :1]), "differs in shape"),
    "shard of another type": (replace_with("images-00001.npy", IMAGES[:4] / 2), "images-00001.npy is float64"),
    "pickled": (replace_with("split.npy", np.array([{}] * 23)), "split.npy"),
    "split too short": (replace_with("split.npy", np.zeros(22, np.uint8)), "22 entries for 23 samples"),
    "split with a 2": (replace_with("split.npy", np.full(23, 2, np.uint8)), "neither 0 nor 1"),
    "labels too long": (replace_with("labels.npy", np.zeros(24, np.int64)), "24 entries for 23 samples"),
    "negative label": (replace_with("labels.npy", np.full(23, -1)), "negative"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    do, message = DAMAGES[damage]
    files = {**written(tmp_path, labels=["a", *"b" * 22]).files}
    do(files)

    with pytest.raises(DatasetInvalid, match=message):
        open_images(files)


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3], [0, 4]])
def test_offsets_that_do_not_fit_are_refused(tmp_path: Path, offsets: list[int]) -> None:
    arrays = {"tokens.npy": np.zeros(3, np.uint8), "offsets.npy": np.array(offsets), "split.npy": np.zeros(1, np.uint8)}
    for name, array in arrays.items():
        np.save(tmp_path / name, array)

    with pytest.raises(DatasetInvalid, match=r"offsets\.npy does not describe tokens\.npy"):
        open_text({name: tmp_path / name for name in arrays})

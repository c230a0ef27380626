"""Editing as jobs: where masks and inputs come from, and what is known of an image staying as it is in the PNG."""

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.errors import DatasetInvalid
from tests.jobs.conftest import DATASET_ID, DIFFUSION, bars
from tests.jobs.folder_run import FolderRun, put, store_array
from worker.jobs.generate import generate
from worker.jobs.pictures import encode_png
from worker.jobs.train import train

MakeRun = Callable[..., FolderRun]
PICTURE = "art_" + "0" * 32
BOX = (1, 4, 7, 6)
"""Broader than high, and nearer to one corner: with left and top exchanged it would be elsewhere."""
HELD_OUT = bars(64)[::8]


def pixels_of(run: FolderRun) -> np.ndarray:
    """Of all samples, ``(N, C, H, W)``."""
    bodies = (io.BytesIO(run.body(one)) for one in sorted(run.artifacts("sample"), key=lambda one: one.name))
    images = np.stack([np.asarray(Image.open(body)) for body in bodies])
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)


def hidden() -> np.ndarray:
    """Where ``BOX`` is."""
    left, top, right, bottom = BOX
    mask = np.zeros((1, 12, 12), bool)
    mask[:, top:bottom, left:right] = True
    return mask


@pytest.fixture
def edit(train_run: MakeRun, generate_run: MakeRun) -> MakeRun:
    """A job that edits with a model of grey images of 12 x 12 pixels, having run."""
    trained = train(train_run(base=DIFFUSION))

    def done(inputs: Mapping[str, Any] = {}, **spec: Any) -> FolderRun:
        asked = {"base": DIFFUSION, "steps": 3, "num_samples": 4, "dataset": DATASET_ID} | spec
        run = generate_run(trained, inputs=inputs, **{name: one for name, one in asked.items() if one is not None})
        generate(run)
        return run

    return done


def stored_png(folder: Path, name: str, image: np.ndarray) -> dict[str, Any]:
    return put(folder, name, encode_png(image)).as_json()


def mask_of(kind: str, folder: Path) -> dict[str, Any]:
    """Fields of the spec and inputs of the job that say what is to be filled."""
    bright = np.where(hidden(), 128, 127).astype(np.uint8)
    match kind:
        case "box":
            return {"box": BOX}
        case "picture":
            return {"mask": PICTURE, "inputs": {"mask_image": stored_png(folder, "mask.png", bright)}}
        case "coloured picture":
            colours = np.concatenate([bright, bright + 9, bright - 9])
            return {"mask": PICTURE, "inputs": {"mask_image": stored_png(folder, "mask.png", colours)}}
        case _:
            files = [
                store_array(folder, "masks.npy", np.stack([bright, 255 - bright])),
                store_array(folder, "masks-split.npy", np.zeros(2, np.uint8)),
            ]
            files = [file | {"name": name} for file, name in zip(files, ("images-00000.npy", "split.npy"), strict=True)]
            data = {"id": "ds_" + "1" * 32, "modality": "image", "info": {"shape": [1, 12, 12]}, "files": files}
            return {"mask": data["id"], "inputs": {"mask_dataset": data}}


@pytest.mark.parametrize("kind", ["box", "picture", "coloured picture", "dataset"])
def test_what_is_outside_of_the_mask_stays_and_what_is_inside_is_drawn(
    edit: MakeRun, tmp_path: Path, kind: str
) -> None:
    run = edit(task="inpaint", **mask_of(kind, tmp_path))

    pixels, originals = pixels_of(run), HELD_OUT[:4]
    assert np.array_equal(pixels[:, ~hidden()], originals[:, ~hidden()])
    assert (pixels[:, hidden()] != originals[:, hidden()]).mean() > 0.5


def test_a_mask_of_another_size_is_refused(edit: MakeRun, tmp_path: Path) -> None:
    small = stored_png(tmp_path, "mask.png", np.zeros((1, 6, 12), np.uint8))

    with pytest.raises(DatasetInvalid, match="the mask is"):
        edit(task="inpaint", mask=PICTURE, inputs={"mask_image": small})


def means(images: np.ndarray) -> np.ndarray:
    """Of squares of 4 x 4 pixels."""
    return images.reshape(*images.shape[:2], 3, 4, 3, 4).astype(float).mean((3, 5))


def test_a_small_picture_is_enlarged_to_one_that_averages_to_it(edit: MakeRun, tmp_path: Path) -> None:
    small = np.arange(9, dtype=np.uint8).reshape(1, 3, 3) * 20 + 30
    picture = stored_png(tmp_path, "small.png", small)

    run = edit(task="super_resolve", factor=4, dataset=None, num_samples=None, images=[PICTURE],
               inputs={"images": [picture]})  # fmt: skip

    assert np.abs(means(pixels_of(run))[0] - small).max() <= 0.5


def test_a_picture_of_the_models_size_is_reduced_first(edit: MakeRun) -> None:
    run = edit(task="super_resolve", factor=4)

    assert np.abs(means(pixels_of(run)) - means(HELD_OUT[:4])).max() <= 0.5


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 12, 3), (3, 3, 3)])
def test_a_picture_of_any_other_size_is_not_enlarged(edit: MakeRun, tmp_path: Path, shape: tuple[int, ...]) -> None:
    picture = stored_png(tmp_path, "odd.png", np.zeros(shape, np.uint8))

    with pytest.raises(DatasetInvalid, match="must all be"):
        edit(task="super_resolve", factor=4, dataset=None, num_samples=None, images=[PICTURE],
             inputs={"images": [picture]})  # fmt: skip


def test_a_grey_picture_gets_colours_whose_mean_it_is(
    train_run: MakeRun, generate_run: MakeRun, tmp_path: Path
) -> None:
    colours = np.concatenate([bars(16), bars(16)[::-1], bars(16) // 2], axis=1)
    files = [store_array(tmp_path, name, one)
             for name, one in (("c-images.npy", colours), ("c-split.npy", np.zeros(16, np.uint8)))]  # fmt: skip
    files = [file | {"name": name} for file, name in zip(files, ("images-00000.npy", "split.npy"), strict=True)]
    data = {"id": DATASET_ID, "modality": "image", "info": {"shape": [3, 12, 12]}, "files": files}
    training = train_run(base=DIFFUSION)
    assignment = replace(training.assignment, inputs=dict(training.assignment.inputs) | {"dataset": data})
    trained = train(replace(training, assignment=assignment))
    grey = bars(1)[0] // 2 + 60
    inputs = {"images": [stored_png(tmp_path, "grey.png", grey)]}

    run = generate_run(trained, base=DIFFUSION, inputs=inputs, task="colourise", images=[PICTURE], steps=3)
    generate(run)

    [pixels] = pixels_of(run)
    assert pixels.shape == (3, 12, 12)
    assert np.abs(pixels.mean(0) - grey[0]).max() <= 0.5
    assert (pixels[0] != pixels[1]).mean() > 0.5


def test_an_image_of_another_job_is_gone_on_from(edit: MakeRun) -> None:
    """The less so, the stronger."""
    first = edit(task="generate", dataset=None, num_samples=2, seed=1)
    pictures = [one.stored.as_json() for one in first.artifacts("sample")]
    given = {"dataset": None, "num_samples": None, "images": [PICTURE] * 2, "inputs": {"images": pictures}, "steps": 10}

    runs = [edit(task="image_to_image", strength=strength, seed=2, **given) for strength in (0.1, 1.0)]

    off = [np.abs(pixels_of(run).astype(float) - pixels_of(first)).mean() for run in runs]
    assert 0 < off[0] < off[1] / 2


def test_images_of_a_dataset_are_gone_on_from(edit: MakeRun) -> None:
    run = edit(task="image_to_image", strength=0.1, steps=10)

    off = np.abs(pixels_of(run).astype(float)[:, None] - HELD_OUT[:4]).mean((2, 3, 4))
    assert np.array_equal(off.argmin(1), np.arange(4))

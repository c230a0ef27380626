"""What a generate job publishes: the same request gives the same bytes, whoever asks and whatever else is asked."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from shared.errors import DatasetInvalid, ModelLoadFailed, UploadFailed
from shared.specs.tasks import Generate
from tests.jobs.conftest import DATASET_ID, DIFFUSION, bars
from tests.jobs.folder_desk import served
from tests.jobs.folder_run import FolderRun, put, store_array
from worker.engine.sampling import Tile
from worker.jobs.generate import generate
from worker.jobs.pictures import encode_png, sheet
from worker.jobs.train import train
from worker.run import Parted, Stopped

MakeRun = Callable[..., FolderRun]


@pytest.fixture
def trained(train_run: MakeRun) -> dict[str, Any]:
    return train(train_run(steps=2))


def samples_of(run: FolderRun) -> dict[str, bytes]:
    return {artifact.name: run.body(artifact) for artifact in run.artifacts("sample")}


def generated(run: FolderRun) -> dict[str, bytes]:
    generate(run)
    return samples_of(run)


def test_each_sample_is_a_png_of_its_own_beside_one_sheet(generate_run: MakeRun, trained: dict[str, Any]) -> None:
    run = generate_run(trained, num_samples=10)

    result = generate(run)

    assert list(samples_of(run)) == [f"sample-{index:04d}.png" for index in range(10)]
    assert {Image.open(io.BytesIO(body)).size for body in samples_of(run).values()} == {(12, 12)}
    assert [artifact.name for artifact in run.artifacts("sheet")] == ["sheet.png"]
    assert result["num_samples"] == 10


def test_two_jobs_with_the_same_request_publish_the_same_bytes(generate_run: MakeRun, trained: dict[str, Any]) -> None:
    first, second = (generate_run(trained, seed=3, num_samples=9) for _ in range(2))

    assert generate(first)["sha256"] == generate(second)["sha256"]
    assert samples_of(first) == samples_of(second)
    assert first.body(first.artifacts("sheet")[0]) == second.body(second.artifacts("sheet")[0])


def test_a_sample_does_not_depend_on_how_many_are_asked_for(generate_run: MakeRun, trained: dict[str, Any]) -> None:
    many = generated(generate_run(trained, seed=3, num_samples=20))

    few = generated(generate_run(trained, seed=3, num_samples=3))

    assert few == {name: many[name] for name in few}


def test_another_seed_gives_other_samples(generate_run: MakeRun, trained: dict[str, Any]) -> None:
    results = [generate(generate_run(trained, seed=seed, num_samples=2))["sha256"] for seed in (0, 1)]

    assert results[0] != results[1]


def test_a_sample_tells_how_to_make_it_again(generate_run: MakeRun, trained: dict[str, Any]) -> None:
    run = generate_run(trained, seed=3, num_samples=2, temperature=0.5)
    body = generated(run)["sample-0001.png"]

    recipe = json.loads(Image.open(io.BytesIO(body)).info["noisemill"])

    assert recipe == {
        "model": "bars@1",
        "weights_sha256": trained["weights"]["sha256"],
        "task": "generate",
        "parameters": {"temperature": 0.5},
        "seed": 3,
        "index": 1,
    }


def test_a_reconstruction_resembles_its_input(generate_run: MakeRun, train_run: MakeRun) -> None:
    fields = {"steps": 300, "learning_rate": 5e-3, "hidden_dim": 64, "latent_dim": 8}
    trained = train(train_run(**fields, preview_every=1000))
    run = generate_run(trained, model_spec=fields, task="reconstruct", dataset=DATASET_ID, num_samples=4)

    pictures = [np.asarray(Image.open(io.BytesIO(body))) for body in generated(run).values()]

    held_out = bars(64)[::8][:4, 0].astype(float)
    blank = np.abs(held_out - held_out.mean(axis=(1, 2), keepdims=True)).mean()
    assert np.abs(np.stack(pictures) - held_out).mean() < blank / 2


def test_pictures_of_a_job_are_read_as_what_they_show(generate_run: MakeRun, trained: dict[str, Any]) -> None:
    drawn = generate_run(trained, num_samples=2)
    generate(drawn)
    pictures = [one.stored.as_json() for one in drawn.artifacts("sample")]

    run = generate_run(trained, task="reconstruct", images=["art_" + "0" * 32] * 2, inputs={"images": pictures})
    generate(run)

    sheet = np.asarray(Image.open(io.BytesIO(run.body(run.artifacts("sheet")[0]))))
    first = np.asarray(Image.open(io.BytesIO(drawn.body(drawn.artifacts("sample")[0]))))
    assert np.array_equal(sheet[2 : 2 + 60 : 5, 2 : 2 + 60 : 5], first)


def test_a_picture_of_another_size_is_refused(generate_run: MakeRun, trained: dict[str, Any]) -> None:
    drawn = generate_run(trained, num_samples=2)
    generate(drawn)
    sheet = drawn.artifacts("sheet")[0].stored.as_json()

    with pytest.raises(DatasetInvalid, match="must all be"):
        generate(generate_run(trained, task="reconstruct", images=["art_" + "0" * 32], inputs={"images": [sheet]}))


def test_a_path_is_one_row_of_the_sheet(generate_run: MakeRun, trained: dict[str, Any]) -> None:
    run = generate_run(trained, task="interpolate", num_pairs=3, num_points=5)

    generate(run)

    assert len(samples_of(run)) == 15
    width, height = Image.open(io.BytesIO(run.body(run.artifacts("sheet")[0]))).size
    assert (width - 2) / 5 == (height - 2) / 3


def test_a_model_is_loaded_once_for_several_jobs(generate_run: MakeRun, trained: dict[str, Any]) -> None:
    first = generate_run(trained, num_samples=1)
    generate(first)

    second = generate_run(trained, num_samples=1)
    (second.folder / trained["weights"]["key"]).unlink()

    assert generated(second) == samples_of(first)
    assert (first.found, second.found) == ([False], [True])


def test_weights_that_do_not_fit_their_description_are_refused(generate_run: MakeRun, trained: dict[str, Any]) -> None:
    run = generate_run(trained, model_spec={"hidden_dim": 33})

    with pytest.raises(ModelLoadFailed, match="model.safetensors does not fit"):
        generate(run)


def test_damaged_weights_are_refused(generate_run: MakeRun, trained: dict[str, Any], tmp_path: Path) -> None:
    damaged = put(tmp_path, "jobs/x/model.safetensors", os.urandom(1000))

    with pytest.raises(ModelLoadFailed, match="model.safetensors is not"):
        generate(generate_run(trained | {"weights": damaged.as_json()}))


def test_an_empty_split_cannot_be_reconstructed(
    generate_run: MakeRun, trained: dict[str, Any], dataset: dict[str, Any], tmp_path: Path
) -> None:
    dataset["files"][2] = store_array(tmp_path, "split.npy", np.zeros(64, np.uint8))

    with pytest.raises(DatasetInvalid, match="no held_out samples"):
        generate(generate_run(trained, task="reconstruct", dataset=DATASET_ID))


def test_a_stopped_job_draws_no_further_sample(generate_run: MakeRun, trained: dict[str, Any]) -> None:
    run = generate_run(trained, num_samples=30)
    run.stop_at = (4, "cancel")

    with pytest.raises(Stopped):
        generate(run)

    assert len(samples_of(run)) < 30


def test_progress_ends_at_its_total(generate_run: MakeRun, trained: dict[str, Any]) -> None:
    run = generate_run(trained, num_samples=11)

    generate(run)

    assert {steps for _, steps, _ in run.steps} == {11}
    done = [step for step, _, _ in run.steps]
    assert done == sorted(done)
    assert done[-1] == 11


def test_a_sample_of_many_steps_tells_of_each_and_is_stopped_within(train_run: MakeRun, generate_run: MakeRun) -> None:
    """It may take longer than a job may be silent."""
    trained = train(train_run(base=DIFFUSION))
    run = generate_run(trained, base=DIFFUSION, num_samples=10, solver="euler", steps=30)
    run.stop_at = (100, "cancel")

    with pytest.raises(Stopped):
        generate(run)

    assert [step[:2] for step in run.steps] == [(8 * done, 300) for done in range(1, 14)]
    assert samples_of(run) == {}


def test_a_preview_of_many_steps_tells_that_it_goes_on(train_run: MakeRun) -> None:
    run = train_run(base=DIFFUSION, steps=2, preview_every=1)

    train(run)

    assert len([step for step, _, values in run.steps if step == 1 and not values]) > 35


def test_the_result_says_what_its_bytes_depend_on(generate_run: MakeRun, trained: dict[str, Any]) -> None:
    result = generate(generate_run(trained, num_samples=1))

    assert result["reproducibility"] == "same_hardware"
    assert {"torch", "device", "num_threads", "tile"} <= result["fingerprint"].keys()


def test_samples_whose_calls_cannot_be_captured_say_so_and_are_the_same(
    generate_run: MakeRun, trained: dict[str, Any]
) -> None:
    plain, asking = generate_run(trained), generate_run(trained, captured=True)

    assert generated(plain) == generated(asking)
    assert asking.logs == ["Calls are not captured, and launched one kernel after the other: the device is no GPU."]
    assert plain.logs == []


def test_what_is_drawn_relaxed_cannot_be_captured() -> None:
    with pytest.raises(ValidationError, match="changes its shape"):
        Generate(task="generate", model="m@1", captured=True, determinism="relaxed")


def test_a_sheet_holds_each_image_at_its_place() -> None:
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1) * 40 * np.ones((1, 3, 64, 64), np.uint8)

    canvas = sheet(images, columns=3)

    assert canvas.shape == (3, 2 * 66 + 2, 3 * 66 + 2)
    assert [int(canvas[0, 2 + 66 * (place // 3), 2 + 66 * (place % 3)]) for place in range(6)] == [
        0,
        40,
        80,
        120,
        160,
        200,
    ]


def test_a_picture_keeps_its_pixels() -> None:
    image = np.arange(3 * 5 * 4, dtype=np.uint8).reshape(3, 5, 4)

    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(image)))), image.transpose(1, 2, 0))


def test_a_picture_has_one_or_three_channels() -> None:
    with pytest.raises(ValueError, match="2"):
        encode_png(np.zeros((2, 4, 4), np.uint8))


def pixels_of(run: FolderRun) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(body)), np.int64) for body in samples_of(run).values()])


def test_relaxed_samples_are_the_same_to_the_eye_and_say_that_their_bytes_may_differ(
    generate_run: MakeRun, trained: dict[str, Any]
) -> None:
    exact, relaxed = (generate_run(trained, num_samples=3, determinism=how) for how in ("exact", "relaxed"))

    results = [generate(run) for run in (exact, relaxed)]

    assert [result["reproducibility"] for result in results] == ["same_hardware", "none"]
    assert [result["fingerprint"]["tile"] for result in results] == [8, None]
    assert np.abs(pixels_of(exact) - pixels_of(relaxed)).max() <= 1


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_samples_in_bf16_resemble_those_in_fp32_and_say_so(
    train_run: MakeRun, generate_run: MakeRun, network: str
) -> None:
    fields = {"base": DIFFUSION | {"network": network, "preset": "xs"}}
    trained = train(train_run(**fields, steps=30, learning_rate=2e-3))
    asked = {"num_samples": 2, "solver": "ddim", "steps": 4}
    full, half = (generate_run(trained, **fields, **asked, precision=how) for how in ("fp32", "bf16"))

    results = [generate(run) for run in (full, half)]

    assert [result["fingerprint"]["precision"] for result in results] == ["fp32", "bf16"]
    recipe = json.loads(Image.open(io.BytesIO(samples_of(half)["sample-0000.png"])).info["noisemill"])
    assert recipe["precision"] == "bf16"
    difference = np.abs(pixels_of(full) - pixels_of(half)).mean()
    assert 0 < difference < 8


def test_a_model_that_knows_no_bf16_draws_in_fp32_and_says_so(train_run: MakeRun, generate_run: MakeRun) -> None:
    trained = train(train_run())
    full, half = (generate_run(trained, num_samples=2, precision=how) for how in ("fp32", "bf16"))

    results = [generate(run) for run in (full, half)]

    assert results[1]["fingerprint"] == results[0]["fingerprint"]
    assert samples_of(half) == samples_of(full)


def test_previews_come_nearer_to_the_sample(train_run: MakeRun, generate_run: MakeRun) -> None:
    trained = train(train_run(base=DIFFUSION))
    run = generate_run(trained, base=DIFFUSION, num_samples=1, solver="euler", steps=8, preview_every=2)
    plain = generate_run(trained, base=DIFFUSION, num_samples=1, solver="euler", steps=8)

    results = [generate(one)["sha256"] for one in (run, plain)]

    shown = run.artifacts("preview")
    assert [one.metadata["step"] for one in shown] == [2, 4, 6]
    assert results[0] == results[1]
    distances = []
    for one in shown:
        picture = np.asarray(Image.open(io.BytesIO(run.body(one))), np.int64)
        size = picture.shape[0] // 12
        seen = picture[2 : 2 + 12 * size : size, 2 : 2 + 12 * size : size][:12, :12]
        distances.append(float(np.abs(seen - pixels_of(run)[0]).mean()))
    assert distances == sorted(distances, reverse=True)


def test_jobs_that_share_the_device_publish_what_they_do_alone(train_run: MakeRun, generate_run: MakeRun) -> None:
    trained = train(train_run(base=DIFFUSION))
    asked = [
        {"seed": 1, "steps": 9, "num_samples": 3},
        {"seed": 2, "steps": 4},
        {"seed": 1, "num_samples": 2, "steps": 9},
    ]
    asked += [
        {"task": "interpolate", "num_pairs": 1, "num_points": 3, "steps": 3},
        {"seed": 3, "determinism": "relaxed"},
    ]
    alone, together = ([generate_run(trained, base=DIFFUSION, **fields) for fields in asked] for _ in range(2))

    expected = [generate(run)["sha256"] for run in alone[:4]]
    results = served(*together)

    assert [results[place]["sha256"] for place in range(4)] == expected
    assert [samples_of(run) for run in together[:4]] == [samples_of(run) for run in alone[:4]]
    assert results[4]["reproducibility"] == "none"


def test_a_small_job_that_comes_later_is_done_before_a_large_one(train_run: MakeRun, generate_run: MakeRun) -> None:
    trained = train(train_run(base=DIFFUSION))
    large = generate_run(trained, base=DIFFUSION, seed=1, steps=3, num_samples=40)
    alone, small = (generate_run(trained, base=DIFFUSION, seed=2, steps=3) for _ in range(2))

    settled = served(large, small)

    assert list(settled) == [1, 0]
    assert settled[1]["sha256"] == generate(alone)["sha256"]


def test_what_fails_for_one_job_is_the_others_no_concern(train_run: MakeRun, generate_run: MakeRun) -> None:
    trained = train(train_run(base=DIFFUSION))
    runs = [generate_run(trained, base=DIFFUSION, num_samples=2, steps=12, seed=seed) for seed in range(4)]
    expected = generate(generate_run(trained, base=DIFFUSION, num_samples=2, steps=12, seed=3))["sha256"]
    runs[0].stop_at = (4, "cancel")
    runs[1] = generate_run(trained | {"weights": trained["weights"] | {"sha256": "0" * 64}}, base=DIFFUSION)

    def refuse(kind: str) -> None:
        raise UploadFailed(f"no {kind} today")

    runs[2].before_publish = refuse
    results = served(*runs)

    assert [type(results[place]).__name__ for place in range(3)] == ["Stopped", "InputDamaged", "UploadFailed"]
    assert results[3]["sha256"] == expected


def test_a_preview_that_fails_ends_its_job_alone(
    train_run: MakeRun, generate_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(train_run(base=DIFFUSION))
    runs = [generate_run(trained, base=DIFFUSION, num_samples=1, steps=8, seed=seed) for seed in range(2)]
    runs[0] = generate_run(trained, base=DIFFUSION, num_samples=1, steps=8, preview_every=2)

    def broken(tile: Any, draw: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(Tile, "look", broken)
    results = served(*runs)

    assert type(results[0]) is ValueError
    assert results[1]["num_samples"] == 1


def test_a_step_that_fails_for_several_jobs_has_each_tried_alone(
    generate_run: MakeRun, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(tile: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(Tile, "step", broken)
    together = served(*(generate_run(trained, num_samples=2, seed=seed) for seed in range(2)))
    alone = served(generate_run(trained, num_samples=2))

    assert {type(one) for one in together.values()} <= {Parted, ValueError}
    assert type(alone[0]) is ValueError

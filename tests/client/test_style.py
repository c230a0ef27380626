"""Style transfer by the command line and by the client library, up to what the worker is handed."""

from typing import Any

from noisemill.client import Client
from tests.client.hand import Hand
from tests.client.test_cli import Run, run

__all__ = ["run"]
SPEC: dict[str, Any] = {"dataset": "ten", "style_dataset": "ten"}


def options(**fields: Any) -> list[str]:
    return [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]


def test_the_command_line_names_datasets_and_one_image_of_one(run: Run, hand: Hand, dataset_id: str):
    run("train", "--family", "style", "--model", "drawn", *options(**SPEC), "--no-wait")
    training = hand.claim("train")
    hand.train(training)
    run("generate", "drawn", "--task", "stylise", *options(dataset="ten", style="ten", style_index=9), "--no-wait")

    asked = hand.claim("generate")

    assert training.inputs["further_datasets"]["style_dataset"]["id"] == dataset_id
    assert asked.inputs["style_dataset"]["id"] == asked.inputs["dataset"]["id"] == dataset_id
    assert (asked.spec["style"], asked.spec["style_index"]) == (dataset_id, 9)


def test_a_client_names_a_picture_that_a_job_made(real: Client, hand: Hand, dataset_id: str):
    job = real.train(family="style", model="drawn", dataset=dataset_id, style_dataset=dataset_id)
    hand.train(hand.claim("train"))
    (picture,) = real.artifacts(job.id)
    real.generate(model="drawn", task="match_style", images=[picture.id], style=picture.id, steps=20)

    asked = hand.claim("generate")

    assert asked.inputs["style_image"] == asked.inputs["images"][0]
    assert asked.spec["steps"] == 20

"""Trainings that begin with a trained model: its architecture is theirs, and what cannot go on from it is refused when
it is submitted."""

from collections.abc import Mapping
from typing import Any, Final

import pytest
from sqlalchemy import update
from sqlmodel import col

from shared.errors import InvalidSpec
from shared.jobs.rows import Dataset
from tests.shared.desk import Desk
from tests.shared.test_built_on import described
from tests.shared.test_references import add_dataset, add_version

ORIGINS: Final[Mapping[str, Mapping[str, Any]]] = {
    "vae": {"preset": "s", "network": "mlp", "latent_dim": 5, "hidden_dim": 32, "likelihood": "gaussian"},
    "vq": {"preset": "s", "quantizer": "ema", "halvings": 3, "codebook_size": 64, "code_dim": 4},
    "gan": {"preset": "s", "network": "sngan", "latent_dim": 9, "base_channels": 24, "num_blocks": 3},
    "diffusion": {"network": "dit", "preset": "s", "patch_size": 2, "objective": "edm", "sigma_data": 0.3},
    "translation": {"preset": "s", "objective": "contrastive", "num_blocks": 3, "critic_layers": 2, "head_dim": 32},
    "style": {"encoder": "digits", "base_channels": 8},
}
"""Of each family a model that has nothing by default."""
OTHERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "vae": {"preset": "xs", "network": "conv", "latent_dim": 6, "hidden_dim": 64, "likelihood": "bernoulli"},
    "vq": {"preset": "xs", "quantizer": "fsq", "halvings": 2, "codebook_size": 65, "code_dim": 5},
    "gan": {"preset": "xs", "network": "r3gan", "objective": "r3gan", "latent_dim": 8, "base_channels": 25,
            "num_blocks": 2},
    "diffusion": {"network": "unet", "preset": "xs", "patch_size": 4, "objective": "eps", "sigma_data": 0.5},
    "translation": {"preset": "xs", "objective": "cycle", "num_blocks": 4, "critic_layers": 3, "head_dim": 64},
    "style": {"encoder": "vgg19", "base_channels": 16},
}  # fmt: skip
"""What else could be asked for."""


def refused(desk: Desk, spec: dict[str, Any]) -> str | None:
    """The field that a training is refused for."""
    try:
        desk.submit(spec=spec)
    except InvalidSpec as error:
        return error.pointer
    return None


class Studio:
    """A tenant with a model of a family, who trains others that begin with it."""

    def __init__(self, desk: Desk, family: str, *, classes: int = 0, of_data: int | None = None, **fields: Any) -> None:
        self.desk, self.family = desk, family
        add_version(desk, "base", 1)
        further = {"translation": "target_dataset", "style": "style_dataset"}
        named = {further[family]: add_dataset(desk)} if family in further else {}
        self.spec = {"family": family, "dataset": f"ds_{desk.dataset_id.hex}", "model": "tuned", **named}
        of_model = {"info": {"shape": [1, 8, 8], "num_classes": classes}}
        described(desk, "base", family=family, spec={**self.spec, **(fields or ORIGINS[family])}, **of_model)
        info = {"shape": [1, 8, 8], "num_classes": classes if of_data is None else of_data}
        desk.work(
            lambda session: session.execute(update(Dataset).where(col(Dataset.id) == desk.dataset_id).values(info=info))
        )

    def refused(self, **fields: Any) -> str | None:
        """The field that a training is refused for."""
        return refused(self.desk, {**self.spec, "init_from": "base", **fields})


@pytest.mark.parametrize("family", ORIGINS)
def test_a_fine_tuning_has_the_architecture_of_its_model_unless_it_says_so(desk: Desk, family: str) -> None:
    studio = Studio(desk, family)

    spec = desk.submit(spec={**studio.spec, "init_from": "base", "steps": 7}).spec

    assert {field: spec[field] for field in ORIGINS[family]} == ORIGINS[family]
    assert (spec["steps"], spec["init_from"], spec["model"]) == (7, "base@1", "tuned")


@pytest.mark.parametrize("family", ORIGINS)
def test_another_architecture_than_that_of_the_model_is_refused_by_its_field(desk: Desk, family: str) -> None:
    studio = Studio(desk, family)

    assert studio.refused(**ORIGINS[family]) is None
    found = {field: studio.refused(**{field: value}) for field, value in OTHERS[family].items()}

    assert found == {field: f"/spec/{field}" for field in OTHERS[family]}


def test_what_follows_from_a_choice_follows_from_that_of_the_model(desk: Desk) -> None:
    studio = Studio(desk, "gan")

    spec = desk.submit(spec={**studio.spec, "init_from": "base"}).spec

    assert (spec["objective"], spec["critic_steps"], spec["betas"]) == ("hinge", 5, [0.0, 0.9])


def test_what_the_model_s_architecture_does_not_allow_is_refused_by_its_field(desk: Desk) -> None:
    studio = Studio(desk, "gan")

    assert studio.refused(critic_steps=2) is None
    assert studio.refused(gamma=2.0) == "/spec/gamma"


@pytest.mark.parametrize("family", ["vq", "gan", "diffusion"])
@pytest.mark.parametrize(
    ("classes", "of_data", "fields", "pointer"),
    [
        (10, 10, {}, None),
        (10, 9, {}, "/spec/dataset"),
        (10, 0, {}, "/spec/dataset"),
        (10, 10, {"class_conditional": False}, "/spec/class_conditional"),
        (0, 10, {}, "/spec/class_conditional"),
        (0, 10, {"class_conditional": False}, None),
    ],
)
def test_a_fine_tuning_knows_as_many_classes_as_its_model(
    desk: Desk, family: str, classes: int, of_data: int, fields: dict[str, Any], pointer: str | None
) -> None:
    assert Studio(desk, family, classes=classes, of_data=of_data).refused(**fields) == pointer


@pytest.mark.parametrize(
    ("classes", "of_data", "origin", "pointer"),
    [
        (10, 10, {"objective": "eps"}, None),
        (10, 7, {"objective": "eps"}, None),
        (0, 10, {"objective": "eps"}, None),
        (10, 0, {"objective": "eps"}, "/spec/dataset"),
        (10, 11, {"objective": "eps"}, "/spec/dataset"),
        (10, 0, {"class_conditional": False}, None),
        (10, 10, {"objective": "x0"}, "/spec/init_from"),
        (10, 10, {"autoencoder": "base@1"}, "/spec/init_from"),
    ],
)
def test_a_consistency_model_comes_of_a_model_that_knows_its_classes(
    desk: Desk, classes: int, of_data: int, origin: dict[str, Any], pointer: str | None
) -> None:
    studio = Studio(desk, "diffusion", classes=classes, of_data=of_data, **origin)

    assert studio.refused(family="consistency") == pointer


@pytest.mark.parametrize(
    ("columns", "fields", "pointer"),
    [
        ({"shape": [1, 8, 8], "counts": {"train": 9, "held_out": 0}}, {"weights": "best"}, "/spec/weights"),
        ({"shape": [1, 8, 8], "counts": {"train": 8, "held_out": 1}}, {"weights": "best"}, None),
        ({"shape": [1, 3, 8]}, {"family": "translation", "target_dataset": ...}, "/spec/dataset"),
        ({"shape": [1, 4, 8]}, {"family": "translation", "target_dataset": ...}, None),
        ({"shape": [3, 8, 7]}, {"family": "style", "style_dataset": ..., "encoder": "vgg19"}, "/spec/dataset"),
        ({"shape": [3, 8, 8]}, {"family": "style", "style_dataset": ..., "encoder": "vgg19"}, None),
    ],
)
def test_a_dataset_that_the_training_cannot_use_is_refused_when_it_is_submitted(
    desk: Desk, columns: dict[str, Any], fields: dict[str, Any], pointer: str | None
) -> None:
    named = {field: add_dataset(desk, info=columns) if value is ... else value for field, value in fields.items()}
    spec = {"family": "vae", "dataset": add_dataset(desk, info=columns), "model": "m", **named}

    assert refused(desk, spec) == pointer

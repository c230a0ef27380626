"""A folder of diffusers by what it says of itself: which model of ours it is, or that it is none."""

from typing import Any

import diffusers
import pytest
from pydantic_core import PydanticCustomError

from shared.specs import FAMILIES
from shared.specs.diffusers_scheduler import config_of, read
from shared.specs.diffusers_unet import TOLD, fields_of
from shared.specs.diffusion import DiffusionSpec
from shared.specs.imports import ImportSpec
from shared.specs.training import Trained
from shared.specs.unet import UNETS
from worker.families import FAMILIES as ABLE

DDPM = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
}  # fmt: skip
CONFIG = {"_class_name": "UNet2DModel", "sample_size": 32, **fields_of(UNETS["b"])}
CIFAR10 = {
    "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu", "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256], "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 32,
    "time_embedding_type": "positional", "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
"""That of google/ddpm-cifar10-32, as it was written in 2022; its scheduler likewise."""
CIFAR10_SCHEDULER = {
    "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02, "beta_schedule": "linear",
    "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000, "trained_betas": None,
    "variance_type": "fixed_large",
}  # fmt: skip


def imported(
    config: dict[str, Any] = CONFIG, scheduler: dict[str, Any] | None = CIFAR10_SCHEDULER, **wanted: Any
) -> Trained:
    asked = ImportSpec.model_validate({"dataset": "ds_" + "0" * 32, "model": "faces", **wanted})
    return DiffusionSpec.imported(asked, {"config": config, "scheduler": scheduler})


def refusal(*args: Any, **wanted: Any) -> tuple[str, str]:
    """The field that is named, and why."""
    with pytest.raises(PydanticCustomError) as refused:
        imported(*args, **wanted)
    context = refused.value.context or {}
    return context["field"], context["message"]


def test_ddpm_on_cifar10_is_preset_b() -> None:
    model = imported(CIFAR10)

    known = model.spec.model_dump(exclude_unset=True)
    assert known == {
        "family": "diffusion", "dataset": "ds_" + "0" * 32, "model": "faces", "network": "unet", "preset": "b",
        "objective": "eps", "class_conditional": False, "dropout": 0.0,
    }  # fmt: skip
    assert model.info == {"shape": [3, 32, 32], "num_classes": 0}


def test_what_is_left_out_has_the_defaults_of_the_library() -> None:
    assert imported({name: value for name, value in CONFIG.items() if name != "norm_num_groups"}).spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn ('gelu', not 'silu')"),
        ({"norm_eps": 1e-5}, "norm_eps (1e-05, not 1e-06)"),
        ({"block_out_channels": [128, 128, 256, 256, 512, 512]}, "it differs from UNets of ours in down_block_types"),
        ({"block_out_channels": [64, 256, 256, 256]}, "channels 64, 256, 256, 256"),
        ({"layers_per_block": 3}, "3 blocks a level"),
        ({"class_embed_type": "timestep"}, "class_embed_type ('timestep', not None)"),
        ({"out_channels": 6}, "out_channels (6, not 3)"),
        ({"sample_size": None}, "does not say sample_size"),
        ({"sample_size": 30}, "multiples of 8"),
        ({"sample_size": [32, 4096]}, "up to 1024"),
        ({"sample_size": -8}, "multiples of 8 up to 1024"),
        ({"in_channels": 4, "out_channels": 4}, "in_channels is 4, and images have 1 or 3"),
        ({"in_channels": "three"}, "config.json: in_channels"),
        ({"future": 1}, "config.json: future: Extra inputs"),
        ({"_class_name": "UNet2DConditionModel"}, "it is of 'UNet2DConditionModel', and UNet2DModel is needed"),
        ({"_class_name": ["UNet2DModel"]}, "and UNet2DModel is needed"),
        ({"num_class_embeds": 1}, "one class and no class are the least"),
        ({"dropout": float("nan")}, "config.json: dropout"),
        ({TOLD: {"objective": "eps", "more": 1}}, "config.json: more"),
        ({TOLD: "eps"}, "config.json"),
        ({TOLD: {"objective": "v"}}, "its scheduler is for another objective than _noisemill in config.json says: v"),
    ],
)
def test_another_network_is_refused_by_its_field(change: dict[str, Any], message: str) -> None:
    field, told = refusal(CONFIG | change)

    assert (field, message in told) == ("dataset", True), told


@pytest.mark.parametrize("dropout", [1.0, -0.1, 2.0])
def test_a_dropout_that_is_none_is_refused(dropout: float) -> None:
    assert refusal(CONFIG | {"dropout": dropout})[0] == "dataset"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "scaled_linear"}, "beta_schedule is 'scaled_linear'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is 'squaredcos_cap_v2'"),
        ({"beta_start": 0.00085}, "beta_start is 0.00085"),
        ({"beta_end": 0.012}, "beta_end is 0.012"),
        ({"num_train_timesteps": 4000}, "num_train_timesteps is 4000"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas makes another process"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr makes another process"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas makes another process"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ({"prediction_type": {}}, "prediction_type is"),
        ({"predict_epsilon": False}, "prediction_type"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "'ScoreSdeVeScheduler' is none that tells us"),
        ({"_class_name": ["DDPMScheduler"]}, "is none that tells us"),
        ({"_class_name": None}, "is none that tells us"),
    ],
)
def test_another_process_is_refused_by_its_field(change: dict[str, Any], message: str) -> None:
    field, told = refusal(CONFIG, CIFAR10_SCHEDULER | change)

    assert (field, message in told) == ("dataset", True), told


@pytest.mark.parametrize("missing", ["beta_start", "beta_end", "beta_schedule", "num_train_timesteps"])
def test_a_scheduler_that_does_not_say_its_process_is_refused(missing: str) -> None:
    told = {name: value for name, value in CIFAR10_SCHEDULER.items() if name != missing}

    assert f"does not say its {missing}" in refusal(CONFIG, told)[1]


@pytest.mark.parametrize(("prediction", "objective"), [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")])
@pytest.mark.parametrize(
    "kind", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_what_the_library_writes_of_its_schedulers_is_read(kind: str, prediction: str, objective: str) -> None:
    scheduler = getattr(diffusers, kind)(**DDPM, prediction_type=prediction)

    assert read({"_class_name": kind, **scheduler.config}).objective == objective


@pytest.mark.parametrize("objective", ["edm", "eps", "v", "x0", "flow"])
def test_what_is_written_of_a_scheduler_of_ours_the_library_opens_and_an_import_reads(objective: Any) -> None:
    config = config_of(objective, 0.4)

    theirs = getattr(diffusers, config["_class_name"]).from_config(config)

    assert all(theirs.config[name] == value for name, value in config.items() if not name.startswith("_"))
    assert read(config).objective == objective
    assert read(theirs.config | {"_class_name": config["_class_name"]}) == read(config)


def test_an_objective_that_nobody_says_has_to_be_given() -> None:
    assert refusal(CONFIG, None)[0] == "objective"
    assert imported(CONFIG, None, objective="v").spec.model_dump()["objective"] == "v"


def test_an_objective_that_contradicts_the_scheduler_is_refused() -> None:
    assert refusal(CONFIG, CIFAR10_SCHEDULER, objective="v") == (
        "objective",
        "the folder says that the objective is eps",
    )


@pytest.mark.parametrize("told", [None, {"objective": "edm", "sigma_data": 0.5, "time_scale": 1.0}])
def test_times_of_edm_that_are_told_otherwise_are_refused(told: dict[str, Any] | None) -> None:
    config = CONFIG | ({} if told is None else {TOLD: told})

    field, message = refusal(config, config_of("edm", 0.5))

    assert (field, "100 ln(sigma) / 4" in message) == ("dataset", True)
    assert refusal(CONFIG, None, objective="edm")[0] == "dataset"


def test_a_scheduler_of_other_data_than_the_network_is_refused() -> None:
    told = {"objective": "edm", "sigma_data": 0.5, "time_scale": 100.0}

    assert "for another objective" in refusal(CONFIG | {TOLD: told}, config_of("edm", 0.4))[1]


def test_a_scheduler_of_edm_for_velocities_is_refused() -> None:
    """Its ``c_out`` has the other sign."""
    told = {"objective": "edm", "sigma_data": 0.5, "time_scale": 100.0}
    scheduler = config_of("edm", 0.5)

    assert imported(CONFIG | {TOLD: told}, scheduler).spec.model_dump()["sigma_data"] == 0.5
    assert "prediction_type" in refusal(CONFIG | {TOLD: told}, scheduler | {"prediction_type": "v_prediction"})[1]


def test_how_many_classes_there_are_has_to_be_said() -> None:
    config = CONFIG | {"num_class_embeds": 11}

    field, message = refusal(config)
    model = imported(config, num_classes=10)

    assert (field, "10 if the last of its 11 class embeddings stands for no class" in message) == ("num_classes", True)
    assert (model.info["num_classes"], model.num_classes) == (10, 10)


@pytest.mark.parametrize(
    ("embeddings", "told", "given"),
    [(11, None, 11), (11, None, 9), (None, None, 10), (11, 10, 9), (11, 9, None), (None, 3, None)],
)
def test_a_number_of_classes_that_does_not_fit_is_refused(embeddings: Any, told: Any, given: Any) -> None:
    marked = {} if told is None else {TOLD: {"objective": "eps", "num_classes": told}}

    field, _ = refusal(CONFIG | {"num_class_embeds": embeddings} | marked, num_classes=given)

    assert field == "num_classes"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_what_reads_each_format_that_its_spec_names(family: str) -> None:
    assert ABLE[family].imports.keys() == FAMILIES[family].imports

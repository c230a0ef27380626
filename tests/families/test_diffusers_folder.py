"""A folder of diffusers by what it says of itself: which model of ours it is, or that it is none."""

import json
from typing import Any

import diffusers
import pytest
import torch
from pydantic_core import PydanticCustomError

from shared.specs import FAMILIES
from shared.specs.diffusers_scheduler import config_of, read
from shared.specs.diffusers_unet import TOLD, fields_of
from shared.specs.diffusion import DiffusionSpec
from shared.specs.imports import ImportSpec
from shared.specs.noising import Process
from shared.specs.training import Trained
from shared.specs.unet import UNETS
from worker.families import FAMILIES as ABLE
from worker.families.nets.preconditioning import betas_of, ddpm_log_sigmas

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


BETAS: dict[str, dict[str, Any]] = {
    "DDPM's own, for more": {"beta_schedule": "linear", "beta_start": 2e-4, "beta_end": 0.03},
    "those of latent diffusion": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "improved DDPM's": {"beta_schedule": "squaredcos_cap_v2"},
    "a sigmoid": {"beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02},
    "one by one": {"trained_betas": [1e-4 + 0.01 * abs((step / 500) % 2 - 1) for step in range(1000)]},
}
"""Other ways to become noise in 1000 steps, as the library's schedulers are told them."""


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
        ({"beta_schedule": "laplace"}, "scheduler_config.json: beta_schedule: Input should be 'linear'"),
        ({"beta_start": 0}, "scheduler_config.json: beta_start: Input should be greater"),
        ({"beta_end": 1.0}, "scheduler_config.json: beta_end: Input should be less"),
        ({"beta_end": 0.2}, "scheduler_config.json: beta_end: by beta_end the last step leaves less than e^-112"),
        ({"num_train_timesteps": 1}, "scheduler_config.json: num_train_timesteps: Input should be greater"),
        (
            {"num_train_timesteps": "many"},
            "scheduler_config.json: num_train_timesteps: Input should be a valid integer",
        ),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas needs a beta for each of num_train_timesteps, and has 2 for"),
        ({"trained_betas": [0.1] * 1000}, "by trained_betas the last step leaves less than e^-105"),
        ({"trained_betas": [0.0] * 1000}, "scheduler_config.json: trained_betas: 0: Input should be greater"),
        ({"trained_betas": []}, "trained_betas needs a beta"),
        ({"rescale_betas_zero_snr": True}, "its rescale_betas_zero_snr leaves nothing of the image at the last time"),
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


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_betas_of_the_library_are_the_process_of_the_model(betas: str, prediction: str) -> None:
    given = BETAS[betas] | {"prediction_type": prediction}
    kind = "DDPMScheduler"  # the only one that has all of them

    model = imported(CONFIG, {"_class_name": kind, **getattr(diffusers, kind)(**given).config})

    told = model.spec.model_dump(mode="json", exclude_unset=True)["process"]
    assert told == {"num_train_timesteps": 1000, **BETAS[betas]}
    theirs = diffusers.DDPMScheduler(**given).alphas_cumprod.double()
    ours = torch.sigmoid(-2 * ddpm_log_sigmas(process_of(model)))
    assert (ours - theirs).abs().max() < 1e-6


def process_of(model: Trained) -> Any:
    return model.spec.process


@pytest.mark.parametrize(
    "drawing",
    [
        *({"timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing")),
        {"steps_offset": 1}, {"clip_sample": False}, {"set_alpha_to_one": False}, {"use_karras_sigmas": True},
    ],
)  # fmt: skip
def test_how_samples_were_drawn_there_changes_nothing_of_the_model(drawing: dict[str, Any]) -> None:
    assert imported(CONFIG, CIFAR10_SCHEDULER | drawing) == imported(CONFIG)


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
def test_betas_that_are_written_the_library_opens_and_an_import_reads(betas: str, objective: Any) -> None:
    process = Process.model_validate({"num_train_timesteps": 1000, **BETAS[betas]})
    config = json.loads(json.dumps(config_of(objective, 0.5, process)))

    theirs = getattr(diffusers, config["_class_name"]).from_config(config)

    assert read(config) == read(theirs.config | {"_class_name": config["_class_name"]})
    assert read(config).process == process
    assert (theirs.alphas_cumprod.double() - (1 - betas_of(process)).cumprod(0)).abs().max() < 1e-6


def test_a_scheduler_of_other_betas_than_the_network_is_refused() -> None:
    told = {TOLD: {"objective": "eps", "process": {"beta_schedule": "squaredcos_cap_v2"}}}

    assert "its scheduler has other betas" in refusal(CONFIG | told)[1]
    assert process_of(imported(CONFIG | told, None)) == Process(beta_schedule="squaredcos_cap_v2")


def test_a_training_goes_on_with_the_betas_that_it_begins_with() -> None:
    """Left out they are the model's; others, DDPM's own among them, are refused."""
    origin = imported(CONFIG, CIFAR10_SCHEDULER | {"beta_schedule": "scaled_linear"})
    given = {"family": "diffusion", "dataset": "ds_" + "0" * 32, "model": "m", "init_from": "faces@1"}
    info = {"shape": [3, 32, 32], "num_classes": 0}

    left_out, linear = (
        DiffusionSpec.model_validate(given | more).begun_with(origin.spec) for more in ({}, {"process": {}})
    )

    assert left_out.process.beta_schedule == "scaled_linear"
    left_out.check_references({"init_from": origin}, info)
    with pytest.raises(PydanticCustomError, match="process is"):
        linear.check_references({"init_from": origin}, info)


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

"""The schedulers of diffusers by their configuration: what a network was trained for that is drawn from with one.

How samples are drawn (their number of steps and its spacing, clipping, the order of a solver) says nothing about the
network, and is not looked at.
"""

from collections.abc import Mapping
from reprlib import repr as shown
from typing import Any, Final

from shared.specs.diffusers_unet import Told
from shared.specs.noising import (
    FIRST_BETA,
    FLOW_TIME,
    HIGHEST_SIGMA,
    LAST_BETA,
    LOWEST_SIGMA,
    NUM_TIMES,
    Objective,
)

PREDICTIONS: Final[Mapping[str, Objective]] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""What the library calls what networks of DDPM's process predict."""
_CALLED: Final = {objective: name for name, objective in PREDICTIONS.items()}
_DDPM: Final[Mapping[str, Any]] = {
    "num_train_timesteps": NUM_TIMES,
    "beta_start": FIRST_BETA,
    "beta_end": LAST_BETA,
    "beta_schedule": "linear",
}
"""Our only process of this kind."""
_OF_DDPM: Final = frozenset({
    "DDIMInverseScheduler", "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "UniPCMultistepScheduler",
})  # fmt: skip
_OF_FLOW: Final = frozenset({"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"})
_OF_EDM: Final = frozenset({"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"})
_CHANGES_THE_PROCESS: Final = ("trained_betas", "rescale_betas_zero_snr", "use_flow_sigmas", "invert_sigmas")
"""Fields that say, unless they are empty or false, that the process is another."""


def config_of(objective: Objective, sigma_data: float) -> dict[str, Any]:
    """The configuration of a scheduler that draws from a network of ours."""
    match objective:
        case "edm":
            edm = {"sigma_min": LOWEST_SIGMA, "sigma_max": HIGHEST_SIGMA, "sigma_data": sigma_data}
            return {"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon", **edm}
        case "flow":
            return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": int(FLOW_TIME)}
        case _:
            return {"_class_name": "DDIMScheduler", "prediction_type": _CALLED[objective], **_DDPM}


def read(config: Mapping[str, Any]) -> Told:
    """What ``scheduler_config.json`` says of the network.

    Raises:
        ValueError: that no network of ours is trained so, or nothing that we know.
    """
    kind, prediction = str(config.get("_class_name")), str(config.get("prediction_type", "epsilon"))
    other = [name for name in _CHANGES_THE_PROCESS if config.get(name)]
    if other:
        raise ValueError(f"its {other[0]} makes another process of it than networks of ours are trained for")
    if kind in _OF_FLOW:
        _require(config, {"num_train_timesteps": int(FLOW_TIME)})
        return Told(objective="flow")
    if kind in _OF_EDM:
        _require({"prediction_type": prediction}, {"prediction_type": "epsilon"})
        return Told(objective="edm", sigma_data=config.get("sigma_data", 0.5))
    if kind not in _OF_DDPM:
        raise ValueError(f"its class {shown(kind)} is none that tells us what a network is trained for")
    _require(config, _DDPM)
    if prediction not in PREDICTIONS or config.get("predict_epsilon") is False:
        raise ValueError(f"its prediction_type is {shown(prediction)}, and {' or '.join(PREDICTIONS)} is needed")
    return Told(objective=PREDICTIONS[prediction])


def _require(config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if name not in config:
            raise ValueError(f"it does not say its {name}")
        if config[name] != value:
            raise ValueError(f"its {name} is {shown(config[name])}, and networks of ours are trained for {value}")

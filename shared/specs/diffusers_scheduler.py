"""The schedulers of diffusers by their configuration: what a network was trained for that is drawn from with one.

How samples are drawn (their number of steps, ``timestep_spacing`` and ``steps_offset``, clipping, the order of a
solver) says nothing about the network, and is not looked at.
"""

from collections.abc import Mapping
from reprlib import repr as shown
from typing import Any, Final

from shared.specs.diffusers_unet import Told
from shared.specs.noising import DDPM, FLOW_TIME, HIGHEST_SIGMA, LOWEST_SIGMA, Objective, Process, telling

PREDICTIONS: Final[Mapping[str, Objective]] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""What the library calls what networks of DDPM's process predict."""
_CALLED: Final = {objective: name for name, objective in PREDICTIONS.items()}
_OF_DDPM: Final = frozenset({
    "DDIMInverseScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
})  # fmt: skip
_OF_FLOW: Final = frozenset({"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"})
_OF_EDM: Final = frozenset({"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"})
_CHANGES_THE_PROCESS: Final[Mapping[str, str]] = {
    "rescale_betas_zero_snr": "leaves nothing of the image at the last time, and no noise level of ours is infinite",
    "use_flow_sigmas": "makes another process of it than networks of ours are trained for",
    "invert_sigmas": "makes another process of it than networks of ours are trained for",
}
"""Fields that say, unless they are empty or false, that the process is none of ours."""


def config_of(objective: Objective, sigma_data: float, process: Process = DDPM) -> dict[str, Any]:
    """The configuration of a scheduler that draws from a network of ours: of DDPM's process as ``generate`` does with
    the solver ``ddim`` and the schedule ``uniform``, or with ``ddpm`` where the library's DDIM lacks the process."""
    match objective:
        case "edm":
            edm = {"sigma_min": LOWEST_SIGMA, "sigma_max": HIGHEST_SIGMA, "sigma_data": sigma_data}
            return {"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon", **edm}
        case "flow":
            return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": int(FLOW_TIME)}
        case _:
            has_ddim = process.trained_betas is not None or process.beta_schedule != "sigmoid"
            return {
                "_class_name": "DDIMScheduler" if has_ddim else "DDPMScheduler",
                "prediction_type": _CALLED[objective],
                **process.told(),
                "timestep_spacing": "trailing",
                "clip_sample": False,
            }


def read(config: Mapping[str, Any]) -> Told:
    """What ``scheduler_config.json`` says of the network.

    Raises:
        ValueError: that no network of ours is trained so, or nothing that we know.
    """
    kind, prediction = str(config.get("_class_name")), str(config.get("prediction_type", "epsilon"))
    for name, why in _CHANGES_THE_PROCESS.items():
        if config.get(name):
            raise ValueError(f"its {name} {why}")
    if kind in _OF_FLOW:
        _require(config, {"num_train_timesteps": int(FLOW_TIME)})
        return Told(objective="flow")
    if kind in _OF_EDM:
        _require({"prediction_type": prediction}, {"prediction_type": "epsilon"})
        return Told(objective="edm", sigma_data=config.get("sigma_data", 0.5))
    if kind not in _OF_DDPM:
        raise ValueError(f"its class {shown(kind)} is none that tells us what a network is trained for")
    if prediction not in PREDICTIONS or config.get("predict_epsilon") is False:
        raise ValueError(f"its prediction_type is {shown(prediction)}, and {' or '.join(PREDICTIONS)} is needed")
    return Told(objective=PREDICTIONS[prediction], process=_process(config))


def _process(config: Mapping[str, Any]) -> Process:
    """That of its betas.

    Raises:
        ValueError: it is none of ours, or the configuration does not say it whole.
    """
    wanted = telling(config.get("trained_betas"), config.get("beta_schedule"))
    for name in wanted:
        if name not in config:
            raise ValueError(f"it does not say its {name}")
    return Process.model_validate({name: config[name] for name in wanted})


def _require(config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if name not in config:
            raise ValueError(f"it does not say its {name}")
        if config[name] != value:
            raise ValueError(f"its {name} is {shown(config[name])}, and networks of ours are trained for {value}")

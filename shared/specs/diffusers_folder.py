"""A folder of diffusers as a model of ours: what it was trained for, as fields of the spec of family ``diffusion``."""

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from shared.specs import diffusers_scheduler
from shared.specs.diffusers_unet import TOLD, Told, UNetConfig
from shared.specs.imports import ImportSpec
from shared.specs.noising import DDPM, EDM_TIME
from shared.specs.spec import wrong
from shared.specs.unet import UNETS, UNetLayout

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
SCHEDULER, INDEX = "scheduler_config.json", "model_index.json"
"""The folder's files; the latter two may be missing."""
SIDES: Final = range(4, 1025)
CHANNELS: Final = (1, 3)
ReadT = TypeVar("ReadT")


def fields_of(wanted: ImportSpec, files: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the spec, and what is known of the data: ``shape`` and ``num_classes``.

    Args:
        wanted: what was asked for.
        files: ``config`` and ``scheduler``, as the folder has them, the latter None where there is none.

    Raises:
        PydanticCustomError: the folder is of no model of ours; it names the field to change.
    """
    config = _read(CONFIG, UNetConfig.of_folder, files["config"])
    layout = _read(CONFIG, UNetConfig.layout, config)
    preset = next((name for name, one in UNETS.items() if one == layout), None)
    if preset is None:
        known = " or ".join(_in_words(one) for one in UNETS.values() if one.patch_size == 1)
        raise _of_folder(f"its UNet has {_in_words(layout)}, and ours have {known}")
    told = _told(wanted, files)
    num_classes = _num_classes(wanted, config, told)
    fields = {
        "network": "unet",
        "preset": preset,
        "objective": told.objective,
        "class_conditional": num_classes > 0,
        "dropout": config.dropout,
    }
    fields |= {"sigma_data": told.sigma_data} if told.objective == "edm" else {}
    fields |= {"process": told.process.told()} if told.process != DDPM else {}
    return fields, {"shape": _shape(config, layout.multiple), "num_classes": num_classes}


def _in_words(layout: UNetLayout) -> str:
    channels = ", ".join(str(channels) for channels in layout.block_out_channels)
    blocks = f"{layout.layers_per_block} blocks a level, attention at level {layout.attention_level}"
    return f"channels {channels} ({blocks}, {layout.norm_num_groups} groups)"


def _shape(config: UNetConfig, multiple: int) -> list[int]:
    """Of its images."""
    size = config.sample_size
    if size is None:
        raise _of_folder("config.json does not say sample_size, the height and width of images")
    sides = [size, size] if isinstance(size, int) else list(size)
    if any(side not in SIDES or side % multiple for side in sides):
        raise _of_folder(f"sample_size is {size}, and multiples of {multiple} up to {SIDES[-1]} are needed")
    if config.in_channels not in CHANNELS:
        raise _of_folder(f"in_channels is {config.in_channels}, and images have {' or '.join(map(str, CHANNELS))}")
    return [config.in_channels, *sides]


def _told(wanted: ImportSpec, files: Mapping[str, Any]) -> Told:
    """What the network was trained for, by all who say something about it."""
    own = files["config"].get(TOLD)
    by_itself = None if own is None else _read(CONFIG, Told.model_validate, own)
    scheduler = files.get("scheduler")
    by_scheduler = None if scheduler is None else _read(SCHEDULER, diffusers_scheduler.read, scheduler)
    told = by_itself or by_scheduler
    if told is None and wanted.objective is None:
        raise wrong("objective", "no scheduler_config.json in the folder says what the network predicts: say it here")
    told = told or Told(objective=wanted.objective or "eps")
    sigma_data = told.sigma_data if told.objective == "edm" else None
    if wanted.objective not in (None, told.objective):
        raise wrong("objective", f"the folder says that the objective is {told.objective}")
    if by_scheduler is not None and (by_scheduler.objective, by_scheduler.sigma_data) != (told.objective, sigma_data):
        raise _of_folder(f"its scheduler is for another objective than {TOLD} in {CONFIG} says: {told.objective}")
    if by_scheduler is not None and by_scheduler.process != told.process:
        raise _of_folder(f"its scheduler has other betas than {TOLD} in {CONFIG} says")
    if told.objective == "edm" and (told.time_scale != EDM_TIME or sigma_data is None):
        raise _of_folder(
            f"networks of the objective edm are told {EDM_TIME:.0f} ln(sigma) / 4 here, as exports of ours say, and "
            "this folder does not"
        )
    return told


def _num_classes(wanted: ImportSpec, config: UNetConfig, told: Told) -> int:
    """How many classes it knows."""
    embeddings = config.num_class_embeds
    given = wanted.num_classes if told.num_classes is None else told.num_classes
    if wanted.num_classes not in (None, given):
        raise wrong("num_classes", f"the folder says that it knows {given} classes")
    if embeddings is None:
        if given:
            raise wrong("num_classes", "the network has no class embeddings")
        return 0
    if embeddings < 2:
        raise _of_folder(f"num_class_embeds is {embeddings}, and one class and no class are the least")
    if given is None:
        known = f"{embeddings - 1} if the last of its {embeddings} class embeddings stands for no class"
        raise wrong("num_classes", f"say how many classes the network knows: {known}")
    if given != embeddings - 1:
        known = f"a network of {given} classes has {given + 1} class embeddings, the last for no class"
        raise wrong("num_classes", f"{known}, and this one has {embeddings}")
    return given


def _read(name: str, read: Callable[[Any], ReadT], content: Any) -> ReadT:
    try:
        return read(content)
    except ValidationError as error:
        first = error.errors()[0]
        named = [*first["loc"], *([field] if (field := first.get("ctx", {}).get("field")) else [])]
        where = ": ".join([name, *(str(part)[:100] for part in named)])
        raise _of_folder(f"{where}: {first['msg']}") from error
    except ValueError as error:
        raise _of_folder(f"{name}: {error}") from error


def _of_folder(message: str) -> Exception:
    return wrong("dataset", message)

"""A training at one step as ONE safetensors file: tensors by name and a JSON header. Nothing is ever unpickled."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shared.errors import ModelLoadFailed

HEADER: Final = "noisemill"
"""The one metadata key; with several, safetensors would write them in random order."""
FORMAT: Final = 1
_DRAWS: Final = frozenset(
    {"kaiming_normal_", "kaiming_uniform_", "normal_", "orthogonal_", "trunc_normal_", "uniform_"}
    | {"xavier_normal_", "xavier_uniform_"}
)
"""What first weights are drawn by, in place."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write CPU tensors; the same content gives the same bytes. ``path`` appears whole or not at all.

    Raises:
        OSError: the disk refused it.
    """
    metadata = {HEADER: json.dumps({"format": FORMAT, **header}, sort_keys=True)}
    unfinished = path.with_name(f".{path.name}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata=metadata)
        unfinished.replace(path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else 0, f"{path.name} could not be written") from error
    finally:
        unfinished.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file of ours.

    Raises:
        ModelLoadFailed: it is damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ModelLoadFailed(f"{path.name} is not a safetensors file of Noisemill: {error!r}") from error
    if header.get("format") != FORMAT:
        raise ModelLoadFailed(f"{path.name} has format {header.get('format')!r}, expected {FORMAT}")
    return tensors, header


def detached_copy(tensor: Tensor) -> Tensor:
    """A copy in main memory that later steps do not touch."""
    return tensor.detach().to("cpu", copy=True)


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """All that a network holds, by name: its state, and the buffers that it does not count as such."""
    return net.state_dict() | dict(net.named_buffers())


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A copy of a training's state after ``step`` steps; writing it can wait."""

    step: int
    spec: Mapping[str, Any]
    data: Mapping[str, Any]
    numerics: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the caller wants to know again, as JSON; the arithmetic depends on none of it."""

    def write(self, path: Path) -> None:
        header = {name: getattr(self, name) for name in ("step", "spec", "data", "numerics", "notes")}
        write_tensors(path, self.tensors, header)

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Raise ModelLoadFailed unless ``path`` is an intact checkpoint."""
        tensors, header = read_tensors(path)
        try:
            fields = {name: header[name] for name in ("step", "spec", "data", "numerics")}
        except KeyError as error:
            raise ModelLoadFailed(f"{path.name} is no checkpoint: its header lacks {error}") from error
        return cls(tensors=tensors, notes=header.get("notes", {}), **fields)


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """A copy of what a model is: its network alone, in main memory."""
    return {name: detached_copy(tensor) for name, tensor in net.state_dict().items()}


def write_weights(path: Path, net: nn.Module, header: Mapping[str, Any]) -> None:
    """Write what ``load_weights`` reads."""
    write_tensors(path, weights_of(net), header)


class _Undrawn(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def undrawn() -> Iterator[None]:
    """Build networks without drawing first weights, which takes most of that time, for ``load_weights`` to fill.

    Only what is drawn is left out: buffers that no file holds are computed as ever.
    """
    with _Undrawn():
        yield


def load_weights(path: Path, net: nn.Module) -> None:
    """Fill ``net``.

    Raises:
        ModelLoadFailed: the file is damaged or its tensors are not exactly those of ``net``.
    """
    tensors, _ = read_tensors(path)
    fill(net.state_dict(), tensors, path.name)


def fill(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy ``tensors`` into those of a network; ModelLoadFailed unless names, shapes and types agree."""
    for name in expected.keys() ^ tensors.keys():
        raise ModelLoadFailed(f"{origin} does not fit the network: {name} is on one side only")
    for name, tensor in expected.items():
        if (tensor.shape, tensor.dtype) != (tensors[name].shape, tensors[name].dtype):
            raise ModelLoadFailed(f"{origin} does not fit the network: {name} has another shape or type")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])

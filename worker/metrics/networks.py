"""Feature networks as safetensors files: which one a name stands for, which bytes it has, what of it is needed.

Nothing is ever executed from a file. One is shipped, the others lie in the operator's folder.
"""

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shared.errors import ModelLoadFailed
from worker.engine.checkpoint import fill

DIGITS: Final = Path(__file__).with_name("digits.safetensors")
"""Weights of the shipped network; ``python -m bench.train_featnet`` made them."""
DIGITS_SHA256: Final = "3f2265005003a4b8d50dbdf3679a994519f700857a7dd6aaddc9d4a1d0646242"
"""Of that file: another one is refused."""
COUNTER: Final = "num_batches_tracked"
"""What torch's batch norm counts in training."""
NetT = TypeVar("NetT", bound=nn.Module)


def find_network(name: str, folder: Path | None) -> tuple[Path, str]:
    """The file of a network and its SHA-256: a shipped one, or ``<name>.safetensors`` in the operator's ``folder``.

    Raises:
        ModelLoadFailed: it is not there, or is not the one that is shipped.
    """
    if name == "digits":
        return DIGITS, digest_of(DIGITS, expected=DIGITS_SHA256)
    if folder is None:
        raise ModelLoadFailed(
            f"the features {name} need weights, and the worker's NOISEMILL_WORKER_FEATURE_NETWORKS is not set"
        )
    path = folder.expanduser() / f"{name}.safetensors"
    return path, digest_of(path)


def digest_of(path: Path, *, expected: str | None = None) -> str:
    """The SHA-256 of a network's file, in hexadecimal.

    Raises:
        ModelLoadFailed: it cannot be read, or is not the one that was expected.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelLoadFailed(f"{path.name} cannot be read: {error.strerror}") from error
    if expected is not None and digest != expected:
        raise ModelLoadFailed(f"{path.name} has SHA-256 {digest}, expected {expected}")
    return digest


def tensors_of(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Those tensors of a file, in float32; what else it holds is not read.

    Raises:
        ModelLoadFailed: it is no safetensors file, or lacks one of them.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if missing := set(names) - set(file.keys()):
                raise ModelLoadFailed(f"{path.name} is another network: it lacks {min(missing)}")
            return {name: file.get_tensor(name).float() for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelLoadFailed(f"{path.name} is no safetensors file: {error}") from error


def fill_from(path: Path, *parts: nn.Module) -> None:
    """Give the weights of a file to parts of networks, whose tensors have the same names.

    Raises:
        ModelLoadFailed: it lacks a tensor, or has one of another shape.
    """
    tensors = tensors_of(path, parts[0].state_dict().keys())
    for part in parts:
        fill(part.state_dict(), tensors, path.name)


def read_network(path: Path, kind: Callable[[], NetT]) -> NetT:
    """A network of this kind with the weights of a file, to be looked through; what else the file holds is left out.

    Raises:
        ModelLoadFailed: it is no safetensors file, or lacks a tensor, or has one of another shape.
    """
    # Without memory, so without first weights: those would come from torch's global generator.
    with torch.device("meta"):
        net = kind()
    own = net.state_dict()
    # How many batches the statistics saw is of no use here, and not in every file.
    counters = {name: torch.tensor(0) for name in own if name.endswith(COUNTER)}
    given = tensors_of(path, own.keys() - counters.keys()) | counters
    fill(own, given, path.name)
    net.load_state_dict(given, assign=True)
    return net.requires_grad_(requires_grad=False).eval()

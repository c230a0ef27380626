"""Repeated blocks of a network, computed by compiled code: one compilation serves all blocks of a kind.

A class of modules is such a block where it says ``is_repeated_block``. How blocks are called is recorded in a step that
is done anyway; from that they are compiled beside the training, in another process, which leaves the code in a folder;
at the moment of the switch that code is read, tried, and nothing is ever compiled in a step. Knows no family.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import torch
from torch import Tensor, nn

from worker.engine.numerics import fingerprint

FOLDER: Final = "TORCHINDUCTOR_CACHE_DIR"
"""What tells torch's compiler where its files are; it has no other way to hear of it."""
HEADERS: Final = "headers"
"""The folder, in the former, of headers that a C++ compiler has read ahead. They are large and of no use later."""
MOST_KINDS: Final = 256
"""Ways in which blocks are called that are compiled for one network; torch's own limit counts all of them together."""
CAPTURED: Final[Mapping[str, Any]] = {
    "recompile_limit": MOST_KINDS,
    "accumulated_recompile_limit": 4 * MOST_KINDS,
    "fail_on_recompile_limit_hit": True,
    # What was compiled before must not change what is compiled next.
    "automatic_dynamic_shapes": False,
    "automatic_dynamic_local_pgo": False,
}
DIFFERENTIATED: Final[Mapping[str, Any]] = {
    "enable_autograd_cache": True,
    # With the forward pass, in its thread: these settings are not heard in the threads that autograd has for devices.
    "force_non_lazy_backward_lowering": True,
}
GENERATED: Final[Mapping[str, Any]] = {
    # No choice by timing, which would come out otherwise another day.
    "deterministic": True,
    "fx_graph_cache": True,
    "fx_graph_remote_cache": False,
    "autotune_remote_cache": False,
    "bundled_autotune_remote_cache": False,
}
CLOSE: Final[Mapping[torch.dtype, float]] = {torch.float16: 0.05, torch.bfloat16: 0.1}
"""By how much, of the largest number, compiled code may differ from plain; see ``CLOSE_IN_32_BITS`` for the others."""
CLOSE_IN_32_BITS: Final = 1e-3
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
}


class CompilationFailed(Exception):
    """Blocks could not be compiled, or compute something else when they are; plain code goes on."""


class Form(NamedTuple):
    """What a compiler has to know of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        return cls(tuple(tensor.shape), tensor.stride(), str(tensor.dtype), tensor.requires_grad)

    def example(self, device: torch.device) -> Tensor:
        """A tensor of this form; its numbers are about [-1, 1] and always the same."""
        size = 1 + sum((length - 1) * step for length, step in zip(self.shape, self.stride, strict=True))
        flat = torch.arange(size, dtype=torch.float64, device=device).sin().to(_DTYPES[self.dtype])
        return flat.as_strided(self.shape, self.stride).detach().requires_grad_(self.requires_grad)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One way in which blocks of one kind are called."""

    block: str
    """The first of them."""
    inputs: tuple[Form, ...]
    is_training: bool
    with_gradient: bool
    autocast: str | None
    """What is computed in fewer bits, by the name of its type."""

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "inputs": [list(form) for form in self.inputs]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Read ``as_json``; TypeError, ValueError or KeyError if it is something else."""
        forms = tuple(Form(tuple(shape), tuple(stride), *rest) for shape, stride, *rest in fields["inputs"])
        return cls(**{**fields, "inputs": forms})

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        """What it is called in."""
        dtype = _DTYPES[self.autocast] if self.autocast else None
        return torch.autocast(device.type, dtype, enabled=dtype is not None)


def blocks_of(net: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a network, by name."""
    return {name: module for name, module in net.named_modules() if getattr(module, "is_repeated_block", False)}


@contextmanager
def recorded(net: nn.Module) -> Iterator[list[Call]]:
    """The ways in which blocks of ``net`` are called inside of this, each once; for what is called with tensors."""
    calls: dict[Any, Call] = {}

    def note(name: str, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not all(isinstance(one, Tensor) and str(one.dtype) in _DTYPES for one in inputs):
            return
        device = inputs[0].device.type
        call = Call(
            block=name,
            inputs=tuple(Form.of(one) for one in inputs),
            is_training=block.training,
            with_gradient=torch.is_grad_enabled(),
            autocast=str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None,
        )
        how = {key: value for key, value in vars(call).items() if key != "block"}
        calls.setdefault((_kind(block), *how.values()), call)

    def hook(name: str) -> Any:
        return lambda block, inputs: note(name, block, inputs)

    hooks = [block.register_forward_pre_hook(hook(name)) for name, block in blocks_of(net).items()]
    found: list[Call] = []
    try:
        yield found
    finally:
        for one in hooks:
            one.remove()
        found.extend(calls.values())


def _kind(block: nn.Module) -> str:
    """What two blocks that are compiled to the same code have in common."""
    plain = (bool, int, float, str, tuple)
    said = [
        (
            type(module).__qualname__,
            sorted((k, str(v)) for k, v in vars(module).items() if _is_said(k) and type(v) in plain),
        )
        for module in block.modules()
    ]
    return repr((said, [(name, Form.of(tensor)) for name, tensor in _tensors(block)]))


def _is_said(name: str) -> bool:
    return not name.startswith("_") and name != "training"


def _tensors(block: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from block.named_parameters()
    yield from block.named_buffers()


def code_key(net: nn.Module, calls: Iterable[Call], device: torch.device) -> str:
    """What compiled code depends on, as a name: how blocks are made and called, source, torch and processor."""
    kinds = [sorted({_kind(block) for block in blocks_of(net).values()}), [call.as_json() for call in calls]]
    files = {file for module in net.modules() if (file := _source_of(type(module))) is not None}
    sources = sorted(hashlib.sha256(one.read_bytes()).hexdigest() for file in files for one in file.parent.glob("*.py"))
    origin = [kinds, sources, fingerprint(device), platform.python_version(), platform.machine()]
    return hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:32]


def _source_of(kind: type[nn.Module]) -> Path | None:
    """The file that a class of modules is in, but for torch's own."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return None if file is None or kind.__module__.startswith("torch.") else Path(file)


@torch.no_grad()
def disturb(net: nn.Module) -> None:
    """Move all weights a little: what begins as zero hides what is wrong with the rest."""
    for weight in net.parameters():
        weight.add_(0.02 * torch.arange(weight.numel()).sin().view(weight.shape))


def compile_blocks(
    net: nn.Module, calls: Iterable[Call], device: torch.device, folder: Path, num_processes: int = 1
) -> None:
    """Let the blocks of ``net`` compute by compiled code in the ways that ``calls`` tell of, after trying each.

    What ``folder`` has is used, what it lacks is compiled into it, by ``num_processes`` at once. Names and weights of
    the network stay as they are.
    To be called in the context of a step (``Numerics.products``, ``exact``).

    Raises:
        CompilationFailed: it did not work; the network computes as before.
    """
    blocks = blocks_of(net)
    try:
        with _unwarned(), _compiling(folder, num_processes):
            for module in _left_out(net):
                module.forward = torch.compiler.disable(module.forward)
            for block in blocks.values():
                if block._compiled_call_impl is None:  # noqa: SLF001 - see ``plain``
                    block.compile(dynamic=False)
            for call in calls:
                _try(blocks[call.block], call, device)
    except Exception as error:
        plain(net)
        raise CompilationFailed(_first_line(error)) from error


def plain(net: nn.Module) -> None:
    """Let all blocks compute by plain code again."""
    for block in blocks_of(net).values():
        block._compiled_call_impl = None  # noqa: SLF001 - what Module.compile sets, and nothing takes back
    for module in _left_out(net):
        vars(module).pop("forward", None)


def _left_out(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if getattr(module, "is_never_compiled", False)]


def settled(*, is_compiled: bool) -> AbstractContextManager[Any]:
    """The context of steps: what was not compiled before is computed by plain code, and nothing is compiled."""
    return torch.compiler.set_stance("eager_on_recompile") if is_compiled else nullcontext()


@contextmanager
def _unwarned() -> Iterator[None]:
    """Torch's compiler warns of its own code as it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _compiling(folder: Path, num_processes: int) -> Iterator[None]:
    # Imported where it is used: that takes seconds.
    import torch._dynamo.config as dynamo  # noqa: PLC0415
    import torch._functorch.config as functorch  # noqa: PLC0415
    import torch._inductor.config as inductor  # noqa: PLC0415
    from torch._inductor import codecache  # noqa: PLC0415

    # Elsewhere they would be where everybody may write.
    for name, place in (("_HEADER_DIR", folder / HEADERS), ("_HEADER_LOCK_DIR", folder / HEADERS / "locks")):
        setattr(codecache, name, str(place))
    # Of the headers torch asks openssl for a digest.
    here = {"compile_threads": num_processes, "cpp_cache_precompile_headers": shutil.which("openssl") is not None}
    before = os.environ.get(FOLDER)
    os.environ[FOLDER] = str(folder)
    try:
        with (
            dynamo.patch(dict(CAPTURED)),
            functorch.patch(dict(DIFFERENTIATED)),
            inductor.patch({**GENERATED, **here}),
            torch.compiler.set_stance("default"),
        ):
            yield
    finally:
        if before is None:
            del os.environ[FOLDER]
        else:
            os.environ[FOLDER] = before


def _try(block: nn.Module, call: Call, device: torch.device) -> None:
    was_training = block.training
    block.train(call.is_training)
    try:
        found = _computed(block, call, device)
        with torch.compiler.set_stance("force_eager"):
            expected = _computed(block, call, device)
    finally:
        block.train(was_training)
    for one, other in zip(found, expected, strict=True):
        _require_close(one, other, call)


def _computed(block: nn.Module, call: Call, device: torch.device) -> list[Tensor]:
    """What comes out, and the slopes by all that is learned and by the inputs."""
    inputs = [form.example(device) for form in call.inputs]
    with torch.set_grad_enabled(call.with_gradient), call.context(device):
        made: Tensor = block(*inputs)
    wanted = [one for one in (*inputs, *block.parameters()) if one.requires_grad]
    if not (call.with_gradient and made.requires_grad):
        return [made]
    slopes = torch.autograd.grad(made, wanted, torch.ones_like(made), allow_unused=True)
    return [made, *(slope for slope in slopes if slope is not None)]


def _require_close(found: Tensor, expected: Tensor, call: Call) -> None:
    computed_in = _DTYPES[call.autocast] if call.autocast else found.dtype
    bound = CLOSE.get(computed_in, CLOSE_IN_32_BITS) * max(1.0, expected.abs().max().item())
    if found.shape != expected.shape or not (found - expected).abs().max().item() <= bound:
        raise CompilationFailed(f"compiled code of {call.block} computes something else")


def _first_line(error: BaseException) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__

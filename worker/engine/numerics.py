"""Everything about arithmetic that decides the last bit of a result: precision, layout, threads, kernels."""

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from shared.specs.tasks import Precision
from shared.specs.training import TrainSpec
from worker.engine.rounding import weights_to_round
from worker.kernels import native

ConcretePrecision = Literal["fp32", "tf32", "bf16", "fp16", "pure_bf16"]

NetT = TypeVar("NetT", bound=nn.Module)

_STEPS: Final = ("halved_at", "regrouped_at", "switched_at")
"""Fields of ``Numerics`` that are steps."""
MEMORY: Any = torch.utils.deterministic
"""Untyped: torch assembles this module at run time."""
AUTOCAST: Final[Mapping[ConcretePrecision, torch.dtype]] = {
    "bf16": torch.bfloat16,
    "pure_bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""What is computed in 16 bits; of ``pure_bf16``, what has no weights that are rounded already."""


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """How a training computes. Chosen when it starts, kept in its checkpoints and used again by a resume."""

    precision: ConcretePrecision
    channels_last: bool
    num_threads: int
    micro_batch: int | None = None
    """Most samples of a forward and backward pass, whose gradients add up to the batch's; None: all of them."""
    halved_at: tuple[int, ...] = ()
    """The steps at which memory ran out and ``micro_batch`` was halved."""
    num_processes: int = 1
    """How many processes train together; their sums are added up."""
    regrouped_at: tuple[int, ...] = ()
    """The steps from which on there were more or fewer of them."""
    switched_at: tuple[int, ...] = ()
    """The steps from which on blocks were computed by compiled code, and from which on they were not, by turns."""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Read ``as_json``; TypeError if it is something else."""
        return cls(**{**fields, **{name: tuple(fields.get(name, ())) for name in _STEPS}})

    @classmethod
    def choose(cls, spec: TrainSpec, device: torch.device, num_processes: int = 1) -> "Numerics":
        """What ``spec`` asks for; what it leaves open is what ``device`` does fast."""
        precision = spec.precision
        if precision == "auto":
            precision = "bf16" if multiplies_bf16(device) else "fp32"
        if precision == "tf32" and not (device.type == "cuda" and multiplies_bf16(device)):
            precision = "fp32"  # no other device has it
        layout = spec.channels_last
        return cls(
            precision=precision,
            channels_last=is_fast_in_nhwc(spec, device) if layout is None else layout,
            num_threads=torch.get_num_threads(),
            num_processes=num_processes,
            micro_batch=spec.micro_batch if isinstance(spec.micro_batch, int) else None,
        )

    @classmethod
    def of_sampling(cls, spec: TrainSpec, precision: Precision, device: torch.device) -> "Numerics":
        """How samples of a model of ``spec`` are drawn that were asked for in ``precision``: in fp32, where no network
        of it knows another."""
        is_asked = precision == "bf16" or (precision == "auto" and multiplies_bf16(device))
        is_bf16 = is_asked and spec.computes_in_type_of_weights
        return cls(
            precision="bf16" if is_bf16 else "fp32",
            channels_last=is_bf16 and (device.type != "cpu" or native.is_available()),
            num_threads=torch.get_num_threads(),
        )

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context of forward passes."""
        dtype = AUTOCAST.get(self.precision)
        return torch.autocast(device.type, dtype, enabled=dtype is not None)

    @contextmanager
    def products(self) -> Iterator[None]:
        """Multiply float32 matrices of a step, forward and backward, as precisely as the precision says."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def place_network(self, net: NetT, device: torch.device) -> NetT:
        """Move a network to ``device`` in its layout."""
        return net.to(device).to(memory_format=self.memory_format)  # pyright: ignore[reportCallIssue]

    def place(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Move a batch to ``device``, images in their layout."""
        if tensor.ndim == 4:
            return tensor.to(device, memory_format=self.memory_format, non_blocking=True)
        return tensor.to(device, non_blocking=True)

    def halved(self, num_rows: int, step: int) -> Self:
        """With passes of half as many samples, from ``step`` on, for batches of ``num_rows``."""
        half = -(-min(self.micro_batch or num_rows, num_rows) // 2)
        return replace(self, micro_batch=half, halved_at=(*self.halved_at, step))

    def among(self, num_processes: int, step: int) -> Self:
        """With so many processes, from ``step`` on."""
        if num_processes == self.num_processes:
            return self
        return replace(self, num_processes=num_processes, regrouped_at=(*self.regrouped_at, step))

    def switched(self, step: int) -> Self:
        """With compiled code for plain, or the other way round, from ``step`` on."""
        return replace(self, switched_at=(*self.switched_at, step))

    @property
    def is_compiled(self) -> bool:
        """Whether blocks are computed by compiled code."""
        return len(self.switched_at) % 2 == 1

    def is_repeatable(self, spec: TrainSpec) -> bool:
        """Whether the same training, on the same hardware, would compute the same: nothing happened on the way."""
        planned = (spec.compiled_from,) if isinstance(spec.compiled_from, int) else ()
        if spec.compiled_from == "auto" or self.switched_at != planned:
            return False
        # Memory that runs out at the first step does so again; later it was an accident.
        return not self.regrouped_at and not any(self.halved_at)

    def as_json(self) -> dict[str, Any]:
        fields = asdict(self) | {name: list(getattr(self, name)) for name in _STEPS}
        # Told of where there is something to tell: the fingerprints of all others stay as they are.
        return fields if self.switched_at else {name: value for name, value in fields.items() if name != "switched_at"}


def for_sampling(net: NetT, numerics: Numerics) -> NetT:
    """A copy of ``net`` to draw samples from: in the layout and, where it may be, the precision of a training.

    Networks inside of it that compute in the type of their weights, and say so, get bfloat16 weights under ``bf16``;
    they take and return float32, so that whoever calls them sees no difference but rounding. All else stays float32:
    their buffers too, as angles and frequencies of waves must be more exact than that.
    """
    copy = deepcopy(net).requires_grad_(requires_grad=False).eval()
    if numerics.precision == "bf16":
        for weight in weights_to_round(copy):
            weight.data = weight.data.to(torch.bfloat16)
    return copy.to(memory_format=numerics.memory_format)  # pyright: ignore[reportCallIssue]


def is_fast_in_nhwc(spec: TrainSpec, device: torch.device) -> bool:
    """Whether convolutions gain by the layout more than norms lose: torch's own lose more on CPUs."""
    return device.type != "cpu" or (spec.nhwc_on_cpu and native.is_available())


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 products are done in hardware; elsewhere they are emulated and slow."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 (no public way)


@contextmanager
def exact(num_threads: int | None = None) -> Iterator[None]:
    """Choose kernels that give the same bits each time, and a number of threads (it orders the sums)."""
    before = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    benchmark, fill = torch.backends.cudnn.benchmark, MEMORY.fill_uninitialized_memory
    # cuBLAS reads this when it makes its first handle; without it torch refuses to be deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # And Inductor this, when it is imported. ``use_deterministic_algorithms`` would import it here and now, which takes
    # as long as all of torch; what follows says the same but for that.
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    torch.set_num_threads(num_threads or before[0])
    torch.set_deterministic_debug_mode("error")
    torch.backends.cudnn.benchmark = False
    MEMORY.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_deterministic_debug_mode(before[1])
        torch.backends.cudnn.benchmark = benchmark
        MEMORY.fill_uninitialized_memory = fill


def fingerprint(device: torch.device) -> dict[str, Any]:
    """What else the last bit of a result depends on: compare it before expecting equal bytes."""
    is_cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if is_cuda else processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "kernels": is_cuda or native.is_available(),
    }


def processor_name() -> str:
    """The model of the CPU where Linux tells it, else its architecture."""
    try:
        described = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in described.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()

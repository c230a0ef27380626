"""A device that is not the CPU and that every machine has: torch's place for devices of others, with tensors that have
no numbers (``FakeTensorMode``).

Whatever would fail on a GPU for where a tensor lies fails on it, too; what would wait for a GPU is noted, and what CUDA
refuses to do. Autocast gives the types that it gives on CUDA; that types fit together is not checked everywhere. For a
process of its own: once it is there, torch takes it for the machine's accelerator.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME: Final = "stand_in"
IN_16_BITS: Final = (
    *("addmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv_transpose2d.input", "linear", "matmul", "mm", "mv"),
    *("einsum", "scaled_dot_product_attention"),
)
IN_32_BITS: Final = (
    *("acos", "binary_cross_entropy_with_logits", "cosine_similarity", "exp", "expm1", "group_norm", "l1_loss"),
    *("layer_norm", "log", "logsumexp", "mse_loss", "nll_loss", "pow.Scalar", "pow.Tensor_Scalar", "pow.Tensor_Tensor"),
    *("reciprocal", "rsqrt", "softplus", "upsample_nearest2d.vec"),
    # Those that CUDA gives a type for their result.
    *("cumsum", "log_softmax.int", "prod", "softmax.int", "sum", "sum.dim_IntList"),
)
"""What autocast does on CUDA (``aten/src/ATen/autocast_mode.h``), of what networks use; CPUs have other lists."""
UNREPEATABLE: Final = (
    *("_adaptive_avg_pool2d_backward", "_ctc_loss_backward", "adaptive_max_pool2d_backward", "avg_pool3d_backward"),
    *("cumsum", "grid_sampler_2d_backward", "histc", "kthvalue", "median.dim", "nll_loss2d_backward", "put_"),
    *("reflection_pad2d_backward", "replication_pad2d_backward", "upsample_bicubic2d_backward"),
    *("upsample_bilinear2d_backward", "upsample_trilinear3d_backward"),
)
"""What CUDA refuses where the same bits are wanted each time (``torch.use_deterministic_algorithms``)."""
_aten: Final = torch.ops.aten


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def set_up() -> torch.device:
    """Give torch the device."""
    _setup_privateuseone_for_python_backend(NAME, _Backend())
    everything = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel)
    some = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for names, chosen in ((IN_16_BITS, lambda: torch.get_autocast_dtype(NAME)), (IN_32_BITS, lambda: torch.float32)):
        for name in names:
            some.impl(name, _cast(_operation(name), chosen), with_keyset=False)
    _KEPT.extend((everything, some))
    return torch.device(f"{NAME}:0")


_KEPT: Final[list[Any]] = []
"""Registrations last as long as these."""


def _operation(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(_aten, packet), overload or "default")


def _cast(operation: Any, chosen: Callable[[], torch.dtype]) -> Callable[..., Any]:
    def act(*args: Any, **kwargs: Any) -> Any:
        dtype = chosen()

        def cast(value: Any) -> Any:
            is_eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if is_eligible and value.device.type == NAME else value

        with _ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.AutocastPrivateUse1)):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    return act


_COUNTS: Final[dict[Any, Callable[[Tensor], Any]]] = {
    _aten.nonzero.default: lambda x: x.new_zeros((x.numel(), x.ndim), dtype=torch.int64),
    _aten._unique2.default: lambda x: (x.flatten()[:1], *x.new_zeros((2, 1), dtype=torch.int64)),
}
"""Operations of whose result not even the shape is known without numbers, and what it may be: all, and one."""


class Watch(TorchDispatchMode):
    """Notes what waits for the device, and what CUDA would refuse; answers questions about numbers as it is told."""

    def __init__(self, *, says: bool) -> None:
        super().__init__()
        self.says = says
        self.waits: set[str] = set()
        self.refused: set[str] = set()
        self.was_asked = False
        """Whether what it says decided about anything."""

    def forget(self) -> None:
        """Begin anew."""
        self.waits.clear()
        self.refused.clear()
        self.was_asked = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func).removeprefix("aten.").removesuffix(".default")
        if name in UNREPEATABLE:
            self.refused.add(f"{name} at {_place()}")
        if func is _aten.index.Tensor and any(_is_mask(one) for one in args[1]):
            if args[0].device.type == NAME:
                self.waits.add(_place())
            return func(
                args[0], [_COUNTS[_aten.nonzero.default](one).flatten() if _is_mask(one) else one for one in args[1]]
            )
        if func is _aten._fused_adamw_.tensor_lr:
            return None  # of which torch does not know that it makes nothing new
        if func in _COUNTS:
            if args[0].device.type == NAME:
                self.waits.add(_place())
            return _COUNTS[func](args[0])
        if func is _aten._local_scalar_dense.default and args[0].device.type == NAME:
            self.waits.add(_place())
            self.was_asked |= args[0].dtype == torch.bool
            return self.says if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is _aten._linalg_check_errors.default or _is_copied_while_waiting(func, args, kwargs or {}):
            self.waits.add(_place())
        return func(*args, **(kwargs or {}))


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool and index.ndim == 1


def _is_copied_while_waiting(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func is _aten._to_copy.default:
        ends = {args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type}
        return len(ends) > 1 and not kwargs.get("non_blocking", False)
    if func is _aten.copy_.default:
        return args[0].device.type != args[1].device.type and not [*args[2:], kwargs.get("non_blocking", False)][0]
    return False


def _place() -> str:
    """The line of ours that is being executed, but for the gradients': those are computed apart."""
    ours = [frame for frame in traceback.extract_stack() if "/worker/" in frame.filename]
    return f"{ours[-1].filename.rpartition('/worker/')[2]}: {ours[-1].line}" if ours else "backward"


class _Numberless(FakeTensorMode):
    @property
    def avoid_device_init(self) -> bool:
        """Yes: it must not try to have the numbers of a tensor that is made of a list."""
        return True


@contextmanager
def without_numbers(*, says: bool) -> Iterator[Watch]:
    """Tensors made inside of this have no numbers; what is there already is used as it is."""
    with _Numberless(allow_non_fake_inputs=True), Watch(says=says) as watch:
        yield watch

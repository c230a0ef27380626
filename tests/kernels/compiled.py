"""Compiles every kernel for a GPU that need not be here, and prints what each came to.

    python -m tests.kernels.compiled 90


Triton brings the assembler. For a process of its own: where kernels are interpreted, none can be compiled.
"""

import json
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from worker.kernels import adamw_triton, group_norm_triton, philox_triton

TILED = {"PIXELS": 64, "CHANNELS": 64}
GROUPED = {"PIECES": 32, "PER_GROUP": 6, "MEMBERS": 8}
WIDE = {"WIDE": tl.float32}
WHOLE = frozenset({"num_pixels", "num_channels", "num_groups", "num_pieces", "num_weights", "num_sums"}) | {
    "num_decayed", "purpose", "num_elements",
}  # fmt: skip
KEYS = {"seed_B": "*i64", "step_B": "*i64", "index_B": "*i64"}

KERNELS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (group_norm_triton.measure, {"x": "*bf16"}, TILED | WIDE),
    (group_norm_triton.settle, {"eps": "fp32"}, GROUPED | WIDE | {"PIXELS": 64}),
    *(
        (kernel, {"x": "*bf16", "y": "*bf16", "dy": "*bf16", "dx": "*bf16"}, TILED | WIDE | {"PER_GROUP": 6, **mode})
        for kernel in (group_norm_triton.apply, group_norm_triton.measure_slopes, group_norm_triton.apply_slopes)
        for mode in ({"MODULATED": False}, {"MODULATED": True})
    ),
    (group_norm_triton.settle_slopes, {}, GROUPED | WIDE | {"MODULATED": True}),
    (adamw_triton._square, {"grad": "*bf16"}, {"SUMMED": adamw_triton.SUMMED}),
    (adamw_triton._root, {}, {"BLOCK": adamw_triton.BLOCK}),
    (
        adamw_triton._descend,
        {"grad": "*bf16", "rounded": "*bf16"},
        {"CLIP_EPS": 1e-6, "ROUNDED": True, "BLOCK": adamw_triton.BLOCK},
    ),
    *(
        (philox_triton._draw, KEYS | {"drawn": drawn}, {"KIND": kind.value, "BLOCKS": philox_triton.BLOCKS})
        for kind, drawn in (
            (philox_triton.BITS, "*i64"),
            (philox_triton.UNIFORM, "*fp32"),
            (philox_triton.NORMAL, "*fp32"),
        )
    ),
]


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> dict[str, Any]:
    """What a kernel needs of the device."""
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32" if name in WHOLE else "*fp32")
        for name in kernel.arg_names
    }
    made = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", capability, 32)
    )
    return {"kernel": kernel.__name__, "shared_bytes": made.metadata.shared, "bytes": len(made.asm["cubin"])}


if __name__ == "__main__":
    print(json.dumps([compiled(*kernel, capability=int(sys.argv[1])) for kernel in KERNELS]))

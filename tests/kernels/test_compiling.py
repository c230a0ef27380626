"""Every kernel compiles to machine code of the GPUs that are meant, though none be here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker.kernels.choice import is_triton_installed


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(tmp_path: Path, capability: int):
    """The interpreter takes what the compiler refuses: whatever Python can evaluate."""
    if not is_triton_installed():
        pytest.skip("Triton has no wheel for this system")
    # Compiling warns of a default that launches never use.
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "0"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.kernels.compiled", str(capability)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert all(kernel["bytes"] > 0 for kernel in json.loads(done.stdout))

"""What a runner writes in passing does not outlive it on the disk, however it ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from worker.scratch import Scratch

HOLDER = """
import sys
from pathlib import Path
from worker.scratch import Scratch
scratch = Scratch(Path(sys.argv[1]))
(scratch.folder / "checkpoint").write_text("x")
print(scratch.folder, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_supervisor_that_starts_removes_the_folders_of_the_dead_alone(tmp_path: Path, is_alive: bool) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        folder = Path(holder.stdout.readline().strip())
        if not is_alive:
            holder.kill()
            holder.wait()

        mine = Scratch(tmp_path).folder
        left = list(tmp_path.iterdir())
        holder.kill()

    assert sorted(left) == sorted([mine, folder] if is_alive else [mine])
    assert (folder / "checkpoint").exists() == is_alive

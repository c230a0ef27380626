"""How the nursery of scripted runners is started."""

import sys
from pathlib import Path

SCRIPTED = (sys.executable, str(Path(__file__).parent / "scripted_runner.py"))

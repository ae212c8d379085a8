"""The models of the tests of tracing are aligned here too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "graph"))

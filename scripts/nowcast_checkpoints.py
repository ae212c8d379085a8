"""Nowcast outside the training process: read saved checkpoints, write a new one from which training resumes.

    python scripts/nowcast_checkpoints.py run/checkpoint-{100,200,300,400,500} --out run/nowcast-500 --horizon 20
    python scripts/nowcast_checkpoints.py run --out run/nowcast-500
    python scripts/nowcast_checkpoints.py step{1,2,3,4,5}.pt --out new.pt --model my_package.models:build

The same as ``nino nowcast``, which is installed with the package. See docs/checkpoints.md.
"""

from __future__ import annotations

import sys

from nino.cli import main

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    sys.argv[:1] = ["nino", "nowcast"]
    main()

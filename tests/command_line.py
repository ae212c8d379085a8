"""Run scripts as from the command line: in a process of their own, or here, since starting PyTorch takes seconds."""

from __future__ import annotations

import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

SCRIPTS = Path(__file__).parents[1] / "scripts"
Done = subprocess.CompletedProcess[str]


def run(script: str, *arguments: object, timeout: int = 300) -> Done:
    """In a process of its own."""
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def assert_refused(done: Done, *words: str) -> None:
    """Exit code 2 and one clear line."""
    assert done.returncode == 2, done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in message


def run_here(script: str, *arguments: object) -> Done:
    """In this process; an exception that would be a traceback is raised."""
    out, errors = StringIO(), StringIO()
    command = [str(SCRIPTS / script), *map(str, arguments)]
    with patch.object(sys, "argv", command), redirect_stdout(out), redirect_stderr(errors):
        try:
            runpy.run_path(command[0], run_name="__main__")
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return Done(command, code, out.getvalue(), errors.getvalue())

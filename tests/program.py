"""The program run inside the test's own process: its output, messages and exit code without starting Python anew."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from errata.cli.main import run


@dataclass(frozen=True)
class Finished:
    """What a run of the program left."""

    returncode: int
    stdout: str
    stderr: str


def errata(*words: object, cwd: Path | None = None) -> Finished:
    """Run ``errata WORDS`` as a shell would, and leave the process as it was."""
    out, err = io.StringIO(), io.StringIO()
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers, hook, arguments = [signal.getsignal(n) for n in numbers], sys.unraisablehook, sys.argv
    place = Path.cwd()
    sys.argv = ["errata", *map(str, words)]
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        warnings.simplefilter("default")
        try:
            os.chdir(cwd or place)
            run()
        except SystemExit as end:
            code = end.code
        finally:
            os.chdir(place)
            sys.argv, sys.unraisablehook = arguments, hook
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)
    assert isinstance(code, int)
    return Finished(code, out.getvalue(), err.getvalue())

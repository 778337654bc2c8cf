"""The entry point: runs the command line, and turns errors and signals into messages and exit codes."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from errata.cli.app import app as app

BAD_INPUT, INTERRUPTED, TERMINATED, BROKEN_PIPE = 2, 130, 143, 141
"""Exit codes; the last three are 128 and the number of the signal that ends such a program."""


def __getattr__(name: str) -> Any:
    if name == "app":  # typer takes a while to load, and an interrupt meanwhile is to be met by run()
        from errata.cli.app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def run() -> NoReturn:
    """Run the command line: one message and exit code 2 for user errors, one line on Ctrl-C.

    A library may turn the interrupt into an error of its own, or lose it inside a destructor; so whatever the verb
    raises after a signal counts as the interruption.
    """
    signals: list[int] = []
    try:
        _on_signals(signals)
        code = _run()
    except BaseException as error:
        if signals or isinstance(error, KeyboardInterrupt):
            _end(signals, error)
        code = _bad_input(error)
    if signals and code:
        _end(signals, None)
    raise SystemExit(code)


def _run() -> int:
    """Run the verb and return its exit code."""
    gc.disable()  # loading makes many objects and drops none: a seventh of the time of --help
    from errata.cli import common
    from errata.cli.app import app

    common.plain_warnings()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        return _broken_pipe()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _bad_input(error: BaseException) -> int:
    """Print a user error and return its exit code; raise any other error again."""
    from errata.errors import ErrataError

    if not isinstance(error, ErrataError):
        raise error
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT


def _on_signals(signals: list[int]) -> None:
    """Make Ctrl-C and SIGTERM raise KeyboardInterrupt, and append them to ``signals``.

    A signal that the parent process set to be ignored stays ignored.
    """
    import signal
    import threading

    def interrupt(number: int, frame: Any) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    def raise_again(hook: Any) -> None:
        """Raise an interrupt again that came inside a destructor or callback, where Python drops it."""
        if issubclass(hook.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.05, signal.raise_signal, (signal.SIGINT,))
            again.daemon = True
            again.start()
        else:
            sys.__unraisablehook__(hook)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    sys.unraisablehook = raise_again


def _end(signals: list[int], error: BaseException | None) -> NoReturn:
    """Print that the program was interrupted and exit at once, even if threads are waiting."""
    import contextlib
    import os
    import signal

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    terminated = bool(signals) and signals[0] == signal.SIGTERM
    hint = f"; {error}" if isinstance(error, KeyboardInterrupt) and str(error) else ""
    word = "terminated" if terminated else "interrupted"
    print(f"{word}: no file is half-written and no model was changed{hint}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(TERMINATED if terminated else INTERRUPTED)


def _broken_pipe() -> int:
    """Let the interpreter exit without an error message although its output is closed."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE

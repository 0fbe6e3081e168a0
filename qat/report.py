"""The edge of a program: errors in one line, and nothing from other libraries.

Commands and recipes share this: `run_command` turns a user's mistake into one line and an exit code; `quiet_libraries`
silences, by name, the messages of other libraries that say nothing about the user's run. A library must do neither.
"""

from __future__ import annotations

import io
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from tempfile import NamedTemporaryFile
from typing import NoReturn

from qat.errors import QatError, UnjudgedError, VerifyError, shown, told

__all__ = ["quiet_libraries", "require_text", "run_command"]


def run_command(main: Callable[[list[str]], object], words: Sequence[str] | None = None) -> NoReturn:
    """Run a program and exit: 0 when it returns, 1 when a verification failed, 2 on a user's mistake.

    3 is for an export that only the user's own program can judge, 4 for any exception that is not qat's: a fault of
    the program. Failures are told on the standard error stream, in one message. The word ``--debug``, wherever it
    stands, or QAT_DEBUG=1 in the environment, shows the traceback before it. When whoever read the output has left
    (``qat verify DIR --json | head``), the program ends with 141, as one that the signal ends, and says nothing. A
    stream that is closed takes nothing, and one whose encoding lacks a character gets a question mark.

    Args:
        main: takes the words of the command line, without ``--debug``.
        words: the command line; none: the process's own.
    """
    words = sys.argv[1:] if words is None else words
    debug = "--debug" in words or os.environ.get("QAT_DEBUG", "0") not in ("", "0")
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, io.StringIO())
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        try:
            main([word for word in words if word != "--debug"])
        finally:
            sys.stdout.flush()  # a reader that has left is noticed here rather than when Python ends
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
            sys.exit(128 + signal.SIGPIPE)
        if debug:
            traceback.print_exc()
        print(f"error: {_in_one_message(error)}", file=sys.stderr)
        codes = ((VerifyError, 1), (UnjudgedError, 3), (QatError, 2))
        sys.exit(next((code for kind, code in codes if isinstance(error, kind)), 4))
    sys.exit(0)


def _reader_has_left() -> bool:
    """Whether a standard stream is a pipe that nobody reads any more; others may break, such as a worker's."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # of one that is closed
            poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _in_one_message(error: Exception) -> str:
    """What is told of an exception; of one that is not qat's also where it arose, for a long run is not run again.

    It is called while the exception is handled.
    """
    if isinstance(error, QatError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__name__}: {told(error)} ({place.filename}, line {place.lineno}): this was not expected: report "
        f"it with its traceback, {_where_traceback()}"
    )


def _where_traceback() -> str:
    """Write the traceback of what is handled into a temporary file, and say where it is."""
    try:
        with NamedTemporaryFile("w", prefix="qat-error-", suffix=".txt", encoding="utf-8", delete=False) as file:
            file.write(traceback.format_exc().encode("utf-8", "replace").decode())
    except OSError:  # of a full disk, among others
        return "which --debug shows"
    return f"which is in {file.name}"


def require_text(words: Iterable[str]) -> None:
    """Check that a command line can be written into files, as UTF-8.

    Raises:
        QatError: a word has other bytes, which Python keeps as halves of surrogate pairs.
    """
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise QatError(f"command line: {shown(word)} is no text in UTF-8: rename what it names")


def quiet_libraries() -> None:
    """Silence, in this process, what other libraries say about themselves; their errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer would warn in every forked process
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars  # type: ignore[attr-defined]

    downloads = sys.stderr.isatty() and not are_progress_bars_disabled()
    for name in ("transformers", "diffusers"):  # both draw bars while they read weights
        if find_spec(name) is not None:
            import_module(f"{name}.utils.logging").disable_progress_bar()
    for name in ("transformers", "torch.utils.flop_counter"):  # now, since transformers sets its level when imported
        logging.getLogger(name).setLevel(logging.ERROR)
    if downloads:  # which transformers hides too, but which can take minutes
        enable_progress_bars()

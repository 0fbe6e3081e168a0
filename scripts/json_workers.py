"""Processes that answer one line of JSON with another: a crash in one of them is an answer like any other."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import IO, Any

import torch

Ask = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def serve(handle: Ask) -> None:
    """Answer requests, one JSON line each, until there are no more; an exception becomes an answer too."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
        for line in sys.stdin:
            try:
                answer = handle(json.loads(line))
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A process that answers one line of JSON with another; started again after it died."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._process: subprocess.Popen[str] | None = None
        self._said: IO[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()  # closes its input, on which it ends
            self._process = None
        if self._said is not None:
            self._said.close()
            self._said = None

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return None if self._process is None else self._process.pid

    def ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Its answer; when it died on the request, an answer that says how."""
        if self._process is None:
            self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed on exit)
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        if self._process.stdin is None or self._process.stdout is None or self._said is None:
            raise RuntimeError("the worker has no pipes")
        try:
            print(json.dumps(dict(request)), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        self._said.seek(0)
        said = self._said.read()[-4000:]
        self.__exit__()
        return {"error": f"the process ended with {code}", "traceback": said}

"""What tyro says of a wrong command line, made one message that names the remedy.

tyro draws a box, whose advice compares spellings alone: for ``--weights`` of a recipe it offers
``--schedule.first-weights`` before ``--spec.weights``. Here its words are taken, and what was meant is found among the
options in its help.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from difflib import get_close_matches
from typing import TypeVar

from qat.errors import QatError, meant, shown

__all__ = ["parsed", "require_first"]

Result = TypeVar("Result")

_FAULTS_SHOWN = 3
_ELSEWHERE = {"lr": "learning-rate", "bits": "weights", "epochs": "steps"}  # what other programs call it
_METAVAR = re.compile(r"^(?:\{[^}]*\} |[\[\]A-Z .|]+ (?=[A-Z][a-z]))")
_RULE = re.compile(r"^ *-{9,} *$", re.MULTILINE)


def require_first(argument: str, words: Sequence[str], choices: Sequence[str], program: str) -> None:
    """Check that a command line begins with one of several names.

    Args:
        argument: what the name is called.
        words: the command line, from where the name belongs.
        choices: the names.
        program: what a user types before them.

    Raises:
        QatError: it does not.
    """
    first = words[0]
    if first.startswith("-"):
        name = next((word for word in words if word in choices), None)
        remedy = f"{program} --help says more" if name is None else f"write {program} {name} {first}"
        raise QatError(f"{argument}: must come before its options, got {shown(first)}: {remedy}")
    if first not in choices:
        raise QatError(
            f"{argument}: must be one of {', '.join(choices)}, got {shown(first)}{meant(first, choices)}: "
            f"{program} --help says more"
        )


def parsed(parse: Callable[[Sequence[str]], Result], words: Sequence[str], program: str, verb: str = "") -> Result:
    """Parse a command line by tyro.

    Args:
        parse: calls tyro, and does nothing else.
        words: the command line.
        program: its name as a user types it.
        verb: the first of the words, where it names a command with options of its own.

    Raises:
        QatError: it is wrong.
        SystemExit: after ``--help``, with code 0.
    """
    try:
        with redirect_stderr(io.StringIO()):
            return parse(words)
    except SystemExit as end:
        if end.code != 2:
            raise
    program = f"{program} {verb}".strip()
    told = " ".join(_RULE.split(_written(parse, words))[1].split())  # between its title and its own advice
    told = told.partition(" Argument helptext:")[0]
    choice = re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)", told)
    if choice is not None:
        value, argument, names = choice.groups()
        choices = re.findall(r"'([^']*)'", names)
        told = f"{argument}: must be one of {', '.join(choices)}, got {shown(value)}{meant(value, choices)}"
    elif missing := re.match(r"Missing from .*?: (.*) \(required\)", told):
        parts = [part.strip().partition(" ") for part in missing[1].split("(required)") if part.strip()]
        described = [f"{name} ({_lowered(_METAVAR.sub('', rest).rstrip('. '))})" for name, _, rest in parts]
        told = f"{' and '.join(described)} must be given"
    else:
        text = _written(parse, [verb, "--help"] if verb else ["--help"])
        known = list(dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][\w.-]*", text)))
        if told.startswith("Unrecognized"):
            strange = [word for word in words if _is_in(told, word) or _is_in(told, word.partition("=")[2])]
            told = _unknown(strange, known, text) or told
        elif verb:  # whose help has all options, so that one which is not there is the cause of what is missing
            names = {word: word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
            told = _unknown([word for word, name in names.items() if name not in known], known, text) or told
    raise QatError(f"{told.rstrip('.')}: {program} --help lists what there is")


def _lowered(text: str) -> str:
    """A text that begins with a small letter, unless its first word is written in capitals."""
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def _is_in(told: str, word: str) -> bool:
    return bool(word) and re.search(rf"(?<!\S){re.escape(word)}(?![^\s,])", told) is not None


def _unknown(strange: Sequence[str], known: Sequence[str], text: str) -> str:
    """What to give in place of words that a program does not know.

    Args:
        strange: the words; the values of unknown options may be among them.
        known: its options.
        text: its help.
    """
    options = [word for word in dict.fromkeys(strange) if word.startswith("-")]
    if options or not strange:
        return "; ".join(
            f"{shown(option)}: there is no such option{_meant_option(option, known, text)}"
            for option in options[:_FAULTS_SHOWN]
        )
    if strange[0].endswith((".yaml", ".yml")):
        return f"{shown(strange[0])}: a configuration file comes before all options"
    kinds = re.findall(r"(?<![\w-])[a-z_-]+:[a-z][\w-]+", text)
    return f"{shown(strange[0])}: one word too many{meant(strange[0], kinds) or ', leave it out'}"


def _meant_option(option: str, known: Sequence[str], text: str) -> str:
    """The end of an error: options of the same last name, or a like one; or where the words belong that it names."""
    name = option.partition("=")[0].strip("-").replace("_", "-")
    section, _, last = name.rpartition(".")
    others = [other for other in known if other != "--help"]
    lasts = {last, _ELSEWHERE.get(last)} - {""}
    same = [other for other in others if re.split(r"--|\.", other)[-1] in lasts]
    kinds = list(dict.fromkeys(re.findall(rf"(?<![\w-]){re.escape(section)}:[\w-]+", text))) if section else []
    typed = f"--{name}"
    near = get_close_matches(typed, others, n=1, cutoff=0.9) or get_close_matches(typed, same, n=3, cutoff=0)
    if near := near or get_close_matches(typed, [] if kinds else others, n=1, cutoff=0.7):
        return f" (did you mean {' or '.join(near)}?)"
    if kinds:
        return f"; options of {section} come after its kind, one of {', '.join(kinds)}"
    if last and re.search(rf"(?<![\w\[-]){re.escape(name.upper())}(?= )", text):
        return f"; {name.upper()} is given by its place, without a name"
    return ""


def _written(parse: Callable[[Sequence[str]], object], words: Sequence[str]) -> str:
    """What tyro writes: rules of dashes instead of boxes, and no word broken at the end of a line."""
    written, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        with redirect_stdout(written), redirect_stderr(written), suppress(SystemExit):
            parse(words)
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return re.sub(r"\x1b\[[\d;]*m", "", written.getvalue())

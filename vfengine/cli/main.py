"""`vfengine VERB …`: one command with a verb for each of `python -m vfengine.VERB`.

A verb's module is imported once it has been named, and nothing here imports torch, so that help
and errors are printed at once.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Sequence

from .. import __version__
from .ending import ended
from .start import begin, short_name
from .streams import open_streams, say, tell

# name: what it does, and the module of its `main(argv, …, program=…)`
VERBS = {
    "generate": ("make clips", "generate"),
    "serve": ("answer requests for clips over HTTP, with a page and a queue", "serve"),
    "train": ("train a model", "train"),
    "bench": ("measure a model on this machine", "bench"),
    "eval": ("compare two sets of clips by their features", "evaluate"),
}


def main(argv: Sequence[str] | None = None, program: str = "vfengine") -> int:
    """Runs one command line; returns the exit status: the verb's own, or 2 for an unknown one.

    argv:    without the program's name; None is the process's own
    program: how it was called, for help and errors
    """
    open_streams()
    argv = sys.argv[1:] if argv is None else list(argv)
    verb = argv[0] if argv else ""
    if verb in ("-h", "--help"):
        return ended(lambda: say(_help(program)), short_name(program))
    if verb == "--version":
        return ended(lambda: say(f"vfengine {__version__}"), short_name(program))
    if verb not in VERBS:
        problem = f"unknown verb {verb!r}" if verb else "no verb"
        expected = f"expected one of: {', '.join(VERBS)}"
        tell(f"{short_name(program)}: error: {problem}, {expected}")
        return 2
    started = begin(briefly=verb != "train")
    run = importlib.import_module(f".{VERBS[verb][1]}", __package__).main
    options = {"program": f"{program} {verb}"}
    if "started" in inspect.signature(run).parameters:
        options["started"] = started
    return run(argv[1:], **options)


def _help(program: str) -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {words}" for name, (words, _) in VERBS.items())
    return (
        f"usage: {program} VERB [flags]\n"
        f"       {program} VERB --help\n"
        f"       {program} --help | --version\n\n"
        "Fast sampling of decomposed video diffusion models.\n\n"
        f"verbs:\n{verbs}\n\n"
        "Each is also python -m vfengine.VERB."
    )

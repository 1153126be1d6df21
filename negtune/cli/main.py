"""Entry point of `negtune`: parse, run one verb, and turn a user's mistake into one line.

Exit codes: 0 done, 1 something was wrong with the input or the machine, 2 the command line, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import negtune
from negtune.cli import demo, doctor, evaluate, export, report, rollouts, steps, verify
from negtune.cli.doctor import EXTRAS

VERBS = {
    **{"demo": demo, "eval": evaluate, "report": report, "export": export, "doctor": doctor},
    **{"rollouts": rollouts, "steps": steps, "verify": verify},
}


class Parser(argparse.ArgumentParser):
    """Errors on one line, with the nearest valid word."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and leave with 2."""
        wrong = re.search(r"invalid choice: '?([^' ]+)'? \(choose from (.*)\)", message)
        if wrong:
            choices = re.findall(r"[\w-]+", wrong[2])
            message = f"unknown choice {wrong[1]!r}{nearest(wrong[1], choices)}; choose from {', '.join(choices)}"
        self.exit(2, f"negtune: error: {message} ({self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = _one_line_warning  # ty: ignore[invalid-assignment]
    try:
        args = parse(arguments)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("negtune: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, for instance `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if "--debug" in arguments or (isinstance(error, RuntimeError) and not is_ours(error)):
            raise
        print(f"negtune: error: {explain(error)}", file=sys.stderr)
        return 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The namespace of a command line; `run` is the verb's function. Exits with 2 on a wrong one."""
    parser = Parser(prog="negtune", description=(negtune.__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"negtune {negtune.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in VERBS.items():
        help_text = (module.__doc__ or "").partition("\n")[0]
        verb = verbs.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        verb.set_defaults(parser=verb, passes_on=False)
        if hasattr(module, "run"):  # else its actions say what to run
            verb.set_defaults(run=module.run)
            verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.add_arguments(verb)
    if not arguments:
        parser.print_help()
        parser.exit(2)
    args, unknown = parser.parse_known_args(arguments)
    if unknown and not args.passes_on:
        flags = re.findall(r"--[\w-]+", args.parser.format_usage())
        args.parser.error(f"unknown argument {unknown[0]}{nearest(unknown[0].partition('=')[0], flags)}")
    args.unknown = unknown
    return args


def nearest(word: str, choices: Sequence[str]) -> str:
    """`; did you mean X?` if something is close, else nothing."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def explain(error: Exception) -> str:
    """One line for a mistake; a missing optional package is named with the command that installs it."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        extra = next((name for name, extra in EXTRAS.items() if package in extra.modules), None)
        return f"{package} is not installed; run: {EXTRAS[extra].install if extra else f'pip install {package}'}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def is_ours(error: Exception) -> bool:
    """RuntimeErrors of negtune say what to do; those of others are faults whose traceback is wanted."""
    return type(error).__module__.startswith("negtune.")


def _one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if category.__module__.startswith("negtune."):
        return f"negtune: warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


if __name__ == "__main__":
    sys.exit(main())

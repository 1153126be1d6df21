"""Run a recipe's `main` so that a user's mistake is one line and Ctrl-C says how to go on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from negtune.cli.main import explain, is_ours

CHECKPOINT = (
    "with --save_strategy steps a checkpoint is in the output folder, and the same command with "
    "--resume_from_checkpoint FOLDER/checkpoint-N goes on from it"
)


def run_recipe(main: Callable[[], None], resume: str = CHECKPOINT) -> None:
    """Call `main`; leave with 1 after a mistake in settings, data or machine, with 130 after Ctrl-C.

    `NEGTUNE_DEBUG=1` shows the traceback.

    Args:
        main: the recipe.
        resume: how to go on after Ctrl-C.
    """
    try:
        main()
    except KeyboardInterrupt:
        print(f"interrupted; {resume}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError, RuntimeError) as error:
        if os.environ.get("NEGTUNE_DEBUG") or (isinstance(error, RuntimeError) and not is_ours(error)):
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    _leave_process_group()


def parsed(parser: Any, smoke: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a `TrlParser` makes of the command line and its YAML file.

    Args:
        parser: whose first dataclass has `smoke`.
        smoke: settings of a smoke run; before those of the file, behind a flag that was typed.

    Raises:
        OSError: the checkpoint to resume from is no folder.
    """
    parser.usage = "%(prog)s [--config FILE.yaml] [--FLAG VALUE ...]; --help lists the flags"  # hundreds, else
    found = parser.parse_args_and_config()
    if found[0].smoke:
        flags = [text for name, value in smoke.items() for text in (f"--{name}", str(value))]
        found = parser.parse_args_and_config([*flags, *sys.argv[1:]])
    for folder in filter(None, (getattr(one, "resume_from_checkpoint", None) for one in found)):
        if not os.path.isdir(folder):
            raise NotADirectoryError(f"--resume_from_checkpoint {folder} is no folder; {CHECKPOINT}")
    return found


def _leave_process_group() -> None:
    """Before Python ends: gloo's threads abort the process now and then if they outlive it. vLLM leaves by itself."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized() and "vllm" not in sys.modules:
        torch.distributed.destroy_process_group()


def no_push(args: Any) -> None:
    """Refuse `--push_to_hub`: a run folder holds the rows to forget and models that still know them."""
    if args.push_to_hub:
        raise ValueError(
            "--push_to_hub would upload the run folder with its rows and fine-tuned stages; "
            "upload the merged model (negtune export, or merged/) instead"
        )

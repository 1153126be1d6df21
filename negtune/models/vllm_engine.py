"""Starting a vLLM engine in this process, beside a trainer whose random numbers it must not touch."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

INSTALL = "pip install 'negtune[vllm]'"


def start_engine(**arguments: Any) -> Any:
    """`vllm.LLM(**arguments)`, in this process unless `VLLM_ENABLE_V1_MULTIPROCESSING` says otherwise.

    Raises:
        ModuleNotFoundError: vLLM is not installed; with the command that installs it.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing is sent anywhere
    try:
        from vllm import LLM
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ModuleNotFoundError(f"this needs vLLM, which is not installed; run: {INSTALL}", name="vllm") from None
    with _random_state_kept():
        tolerate_lazy_modules()
        return LLM(**arguments)


def leave_others_alone(llm: Any) -> None:
    """Let an engine in this process end without a shutdown, which vLLM else runs when the engine is collected.

    It destroys the process groups of the whole process: those of the other engines and of the trainer.
    """
    client = llm.llm_engine.engine_core
    if hasattr(client, "engine_core"):  # not a client of an engine in a process of its own
        client._finalizer.detach()


@contextmanager
def emptied_on_error(llm: Any) -> Iterator[None]:
    """What an interrupted call leaves in the engine would come out of the next one."""
    try:
        yield
    except BaseException:
        engine = llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        raise


def tolerate_lazy_modules() -> None:
    """Let vLLM start beside modules with objects that invent their attributes.

    On a CPU vLLM 0.31 looks for kernels in the `__dict__` of everything in every loaded module. llvmlite, which numba
    and with it bm25s bring in, answers that with a function, and vLLM ends in an AttributeError.
    """
    try:
        from vllm.triton_utils import dispatcher
    except ImportError:  # another vLLM, which does not look
        return

    def mapping_of(value: Any) -> Mapping[str, Any]:
        found = vars(value)
        return found if isinstance(found, Mapping) else {}

    dispatcher.vars = mapping_of


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds the random numbers of this process, which are the trainer's too, and sets its float32 precision."""
    python, numpy, precision = random.getstate(), np.random.get_state(), torch.get_float32_matmul_precision()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_float32_matmul_precision(precision)

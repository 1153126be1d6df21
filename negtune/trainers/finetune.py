"""The stage before unlearning: supervised fine-tuning with TRL's `SFTTrainer`, done once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from negtune.models.load import load_model
from negtune.records import read_json, write_json
from negtune.trainers.config import CHECKPOINTING, trains_on_cpu

logger = logging.getLogger(__name__)


def fine_tune(
    model: str,
    rows: Sequence[Mapping[str, Any]],
    folder: str | Path,
    *,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    max_length: int = 512,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """Fine-tune all weights of `model` on prompt/completion `rows` and save it to `folder`, unless it is there already.

    Same rows, model and settings give the finished folder back at once; a folder that an interrupted run left behind is
    done anew.

    Args:
        model: hub id, path, or a name `load_model` knows.
        rows: TRL prompt/completion rows; only the completion is trained.
        folder: model folder to write.
        epochs, learning_rate, batch_size, max_length, seed: of the fine-tuning; linear decay, 10 % warm-up.
        settings: further `SFTConfig` fields.

    Returns:
        `folder`.
    """
    folder = Path(folder)
    recipe = {
        "model": str(model),
        "rows": hashlib.sha256(json.dumps([_pair(r) for r in rows], sort_keys=True).encode()).hexdigest(),
        **{"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed},
        **{"max_length": max_length, **{k: str(v) for k, v in settings.items()}},
    }
    done, processes = folder / "fine_tuned.json", PartialState()
    finished = done.exists() and read_json(done) == recipe
    processes.wait_for_everyone()  # everybody has looked before anybody writes
    if finished:
        logger.info("using the fine-tuned model in %s", folder)
        return folder
    if processes.is_main_process:
        done.unlink(missing_ok=True)
    _train(model, rows, folder, recipe, settings)
    processes.wait_for_everyone()  # the weights are on disk
    if processes.is_main_process:
        write_json(done, recipe)
    processes.wait_for_everyone()
    return folder


def _train(
    name: str, rows: Sequence[Mapping[str, Any]], folder: Path, recipe: Mapping[str, Any], settings: dict[str, Any]
) -> None:
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load_model(name, dtype=torch.float32)  # AdamW on half-precision weights loses its updates
    on_cpu = settings.get("use_cpu") or trains_on_cpu()
    args = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=recipe["epochs"],
        learning_rate=recipe["learning_rate"],
        per_device_train_batch_size=recipe["batch_size"],
        max_length=recipe["max_length"],
        seed=recipe["seed"],
        **{"warmup_steps": 0.1, "weight_decay": 0.01, "save_strategy": "no", "report_to": "none"},
        **({} if "gradient_checkpointing" in settings else {CHECKPOINTING: not on_cpu}),
        **{"bf16": not on_cpu, **settings},
    )
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list([_pair(r) for r in rows]), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(str(folder))


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"], "completion": row["completion"]}

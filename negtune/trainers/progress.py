"""What a person watches while a trainer runs, and what is left of it on disk."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from negtune.models.sharing import TokenCounts
from negtune.records import append_jsonl, read_jsonl, write_jsonl

MOST_VALUES = 2048
"""Of one batch that are kept for quantiles."""
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


class MetricSums:
    """Means and quantiles of per-row or per-token values between two logging steps, over all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, values: Tensor) -> None:
        """Average `values` into `name`."""
        total = self._sums[name]
        total[0] += float(values.float().cpu().double().sum())
        total[1] += values.numel()

    def add_ratio(self, name: str, part: float, whole: float) -> None:
        """Make `name` the sum of all parts over the sum of all wholes."""
        total = self._sums[name]
        total[0] += part
        total[1] += whole

    def add_tokens(self, counts: TokenCounts) -> None:
        """`tokens/shared`, the part of the rows' tokens that was not computed again, and `tokens/padding`, the part of
        the processed tokens that was filler."""
        self.add_ratio("tokens/shared", counts.rows - counts.distinct, counts.rows)
        self.add_ratio("tokens/padding", counts.processed - counts.distinct, counts.processed)

    def add_gradients(self, gradients: Mapping[str, Sequence[Tensor]]) -> None:
        """`side/grad_norm` of two sides, and where neither is zero `grad_cosine` between them.

        Args:
            gradients: by side, one per parameter.
        """
        norms = {side: _norm(tensors) for side, tensors in gradients.items()}
        for side, norm in norms.items():
            self.add_ratio(f"{side}/grad_norm", norm, 1)
        if min(norms.values()) > 0:
            inner = sum(
                float(torch.vdot(a.flatten().float(), b.flatten().float()))
                for a, b in zip(*gradients.values(), strict=True)
            )
            self.add_ratio("grad_cosine", inner / math.prod(norms.values()), 1)

    def add_quantiles(self, name: str, values: Tensor) -> None:
        """Keep `values` for the 10 %, 50 % and 90 % quantiles; of very many only every so manieth."""
        flat = values.float().flatten()
        self._values[name] += flat[:: max(1, flat.numel() // MOST_VALUES)].cpu().double().tolist()

    def flush(self) -> dict[str, float]:
        """The metrics so far, and start anew. Every process must call it."""
        from accelerate.utils import gather_object

        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        values: dict[str, list[float]] = defaultdict(list)
        for part_sums, part_values in gather_object([(dict(self._sums), dict(self._values))]):
            for name, (total, count) in part_sums.items():
                sums[name][0] += total
                sums[name][1] += count
            for name, items in part_values.items():
                if items:
                    values[name] += items
        self.__init__()
        metrics = {name: total / count for name, (total, count) in sums.items() if count}
        for name, items in values.items():
            quantiles = np.quantile(np.asarray(items), list(QUANTILES.values()))  # torch's takes 2^24 values at most
            metrics |= {f"{name}_{label}": q for label, q in zip(QUANTILES, quantiles.tolist(), strict=True)}
        return metrics


def _norm(gradients: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(g.float())) ** 2 for g in gradients))


class HistoryCallback(TrainerCallback):
    """Append every logged row to `history.jsonl`; a resumed run drops the rows it is going to repeat."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "history.jsonl"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.path.exists():
            return
        if state.global_step == 0:
            self.path.unlink()
            return
        write_jsonl(self.path, [row for row in read_jsonl(self.path) if row["step"] <= state.global_step])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        row = {"eval/" + k[5:] if k.startswith("eval_") else k: v for k, v in logs.items()}
        append_jsonl(self.path, [{"step": state.global_step, **row}])


Columns = tuple[tuple[str, str, str], ...]
"""Metric, title, and how to write its value."""


class ProgressTable(TrainerCallback):
    """One line per logging step, and one per evaluation.

    Args:
        columns: of the line; those whose metric is not logged are left out.
        evaluated: metrics of the line per evaluation.
    """

    UNLEARNING: Columns = (
        ("step", "step", "{:d}"),
        ("loss", "loss", "{:.3f}"),
        ("forget/logp", "forget logp/tok", "{:.2f}"),
        ("forget/probability", "forget prob", "{:.2e}"),
        ("forget/weight_p10", "W p10", "{:.2f}"),
        ("forget/weight_p50", "W p50", "{:.2f}"),
        ("forget/weight_p90", "W p90", "{:.2f}"),
        ("retain/logp", "retain logp/tok", "{:.2f}"),
        ("retain/probability", "retain prob", "{:.2f}"),
        ("retain/kl", "retain KL", "{:.3f}"),
        ("grad_norm", "grad norm", "{:.2f}"),
    )

    def __init__(
        self,
        columns: Columns = UNLEARNING,
        evaluated: tuple[str, ...] = (
            *("forget/probability", "retain/probability", "forget_quality", "model_utility"),
            "separation",
        ),
    ) -> None:
        from rich.console import Console

        self.columns, self.evaluated = columns, evaluated
        self.console = Console(highlight=False, soft_wrap=True)
        self.shown: tuple[str, ...] = ()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self._row({"step": state.global_step, **logs}, state.max_steps)
        elif any(k.startswith("eval_") for k in logs):
            self._evaluation(logs, state.global_step)

    def _row(self, logs: dict[str, Any], max_steps: int) -> None:
        columns = [c for c in self.columns if c[0] in logs]
        if self.shown != tuple(c[0] for c in columns):
            self.shown = tuple(c[0] for c in columns)
            self.console.print("[bold]" + "  ".join(f"{title:>{_width(title)}}" for _, title, _ in columns) + "[/bold]")
        cells = [f"{_cell(logs[name], pattern):>{_width(title)}}" for name, title, pattern in columns]
        self.console.print("  ".join(cells) + f"  of {max_steps}")

    def _evaluation(self, logs: dict[str, float], step: int) -> None:
        parts = [f"{name} {logs['eval_' + name]:.3g}" for name in self.evaluated if f"eval_{name}" in logs]
        self.console.print(f"[cyan]evaluation at step {step}:[/cyan] " + ", ".join(parts))


def _width(title: str) -> int:
    return max(7, len(title))


def _cell(value: Any, pattern: str) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return pattern.format(value)

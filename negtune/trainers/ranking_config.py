"""Settings of `RankingTrainer`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from negtune._st_compat import BaseTrainingArguments
from negtune.losses.hard_negatives import IN_BATCH_LOSSES
from negtune.retrieval.losses import NEED_TEACHER, OBJECTIVES, known_settings
from negtune.trainers.config import CHECKPOINTING, trains_on_cpu

KINDS = ("auto", "bi_encoder", "cross_encoder", "multi_vector", "causal_lm")
OBJECTIVE = ("k", "n_samples", "estimator", "metric", "gain", "temperature", "alpha", "entropy_weight", "kl_weight")
"""Fields that are hyper-parameters of the objective."""


@dataclass
class RankingConfig(BaseTrainingArguments):
    """sentence-transformers' training arguments, plus the objective and how lists become scores.

    `per_device_train_batch_size` counts *queries*, each with its list of documents. `bf16` and `gradient_checkpointing`
    default to on where there is an accelerator and off on a CPU. `prompts` is a mapping of `query` and `document`, or
    for a cross-encoder a text; by default those of the model, which searching uses too.
    """

    objectives: ClassVar[Mapping[str, Callable[..., Tensor]]] = OBJECTIVES

    output_dir: str | None = field(default=None, metadata={"help": "Where checkpoints and records go."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Adapters want ten times as much."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or below 1 their share of all."})
    logging_steps: float = field(default=10, metadata={"help": "Steps, or below 1 their share of all."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Queries of a batch."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Where else metrics are sent."})  # noqa: RUF036
    bf16: bool | None = field(default=None, metadata={"help": "Default: on, except on a CPU."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass. Default: off."}
    )

    model_kind: str = field(
        default="auto",
        metadata={
            "help": "What a model given by name is: bi_encoder, cross_encoder, multi_vector, or causal_lm (reranks by "
            "its yes and no logits). auto: bi_encoder."
        },
    )
    loss_type: str = field(
        default="pg_rank", metadata={"help": "One of negtune.losses.ranking.RANKING_LOSSES, star or masked_infonce."}
    )
    k: int | None = field(default=None, metadata={"help": "Places that count; the objective's default if not given."})
    n_samples: int | None = field(default=None, metadata={"help": "Sampled rankings a query; pg_rank: 16."})
    estimator: str | None = field(
        default=None, metadata={"help": "Of pg_rank: pl_rank, pl_rank_loo, rtg_loo, loo or reinforce."}
    )
    metric: str | None = field(default=None, metadata={"help": "Of pg_rank: ndcg, dcg, precision, recall, mrr or map."})
    gain: str | None = field(default=None, metadata={"help": "Of a grade: linear or exponential."})
    temperature: float | None = field(default=None, metadata={"help": "Scores are divided by it."})
    alpha: float | None = field(
        default=None, metadata={"help": "Of star: weight of other queries' documents beside the query's own negatives."}
    )
    entropy_weight: float | None = field(default=None, metadata={"help": "Bonus for entropy, of pg_rank."})
    kl_weight: float | None = field(default=None, metadata={"help": "Cost of leaving the warm start, of pg_rank."})
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further hyper-parameters of the objective."}
    )
    scale: float | None = field(
        default=None, metadata={"help": "Similarities are multiplied by it. Default: 20 for cosines, else 1."}
    )
    in_batch: bool = field(
        default=False,
        metadata={
            "help": "Documents of the batch's other queries are candidates too, with gain 0, but for those that are "
            "known to be relevant. On for star and masked_infonce."
        },
    )
    mini_batch_size: int | None = field(
        default=None, metadata={"help": "Texts embedded at a time (GradCache, exact): memory for that many."}
    )
    mini_batch_num_tokens: int | None = field(default=None, metadata={"help": "The same, by tokens."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a text; default: the model's own limit."})
    disable_dropout: bool = field(default=False, metadata={"help": "Set every dropout probability to 0."})
    redact: bool = field(default=False, metadata={"help": "Keep the text of the data out of cards and dumps."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained when the model is given by name."}
    )

    _VALID_DICT_FIELDS = [*BaseTrainingArguments._VALID_DICT_FIELDS, "loss_kwargs", "model_init_kwargs"]

    def __post_init__(self) -> None:
        on_cpu = self.use_cpu or trains_on_cpu()
        if self.bf16 is None:
            self.bf16 = not on_cpu and not self.fp16
        checkpointing = bool(self.gradient_checkpointing or getattr(self, CHECKPOINTING))
        self.gradient_checkpointing = checkpointing
        setattr(self, CHECKPOINTING, checkpointing)
        if on_cpu:
            self.dataloader_pin_memory = False
        self.remove_unused_columns = False
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False  # lists of a batch cannot be sliced and sent
        if self.model_kind not in KINDS:
            raise ValueError(f"model_kind must be one of {', '.join(KINDS)}, got {self.model_kind!r}")
        if self.loss_kwargs is not None and not isinstance(self.loss_kwargs, dict):
            raise ValueError(f"loss_kwargs must be a mapping of hyper-parameters, got {self.loss_kwargs!r}")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be positive and finite, got {self.scale}")
        known_settings(self.loss_type, self.objective_settings(), self.objectives)
        self.in_batch = self.in_batch or self.loss_type in IN_BATCH_LOSSES
        if self.kl_weight and self.loss_type != "pg_rank":
            raise ValueError(f"kl_weight is for pg_rank, got loss_type={self.loss_type}")
        for name in ("mini_batch_size", "mini_batch_num_tokens", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def objective_settings(self) -> dict[str, Any]:
        """Hyper-parameters of the objective that were given."""
        given = {name: getattr(self, name) for name in OBJECTIVE if getattr(self, name) is not None}
        for name in self.loss_kwargs or {}:
            if name in given:
                raise ValueError(f"{name} is given twice, by itself and in loss_kwargs; leave one of them out")
        return {**given, **(self.loss_kwargs or {})}

    @property
    def needs_teacher(self) -> bool:
        """Whether rows must have teacher_scores."""
        return self.loss_type in NEED_TEACHER

    @property
    def places(self) -> int | None:
        """Places that every list must have, of objectives with a cut-off; over the batch lists are long enough."""
        if self.in_batch:
            return None
        given = self.objective_settings().get("k")
        parameter = inspect.signature(self.objectives[self.loss_type]).parameters.get("k")
        return parameter.default if given is None and parameter is not None else given

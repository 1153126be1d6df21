"""Settings of `QueryEncoderTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from negtune.losses.hard_negatives import SEARCH_LOSSES
from negtune.retrieval.query_side import RANK_BY
from negtune.trainers.ranking_config import RankingConfig


@dataclass
class QueryEncoderConfig(RankingConfig):
    """Settings of `RankingConfig`, plus how the index is searched; a batch counts queries.

    Defaults are those of the published runs of ADORE (200 documents found, 200 places count, 32 queries a step, 5e-6).
    Fields that are about documents of a batch (`in_batch`, `mini_batch_size`, ...) are refused: none is embedded.
    """

    objectives: ClassVar[Mapping[str, Callable[..., Tensor]]] = SEARCH_LOSSES

    learning_rate: float = field(default=5e-6, metadata={"help": "Adapters want ten times as much."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Queries of a batch."})
    loss_type: str = field(default="adore", metadata={"help": "One of negtune.losses.hard_negatives.SEARCH_LOSSES."})
    metric: str | None = field(
        default=None, metadata={"help": "Of adore: mrr or ndcg. Of pg_rank: ndcg, dcg, precision, recall, mrr or map."}
    )
    depth: int = field(default=200, metadata={"help": "Documents that the search of each query returns."})
    metric_cut: int | None = field(default=None, metadata={"help": "Places that count, of adore; default: depth."})
    rank_by: str = field(
        default="list",
        metadata={"help": "Places of adore: list, those of the search (as released), or score, of what is trained."},
    )
    save_document_encoder: bool = field(
        default=True,
        metadata={"help": "save_model writes one model with both encoders; else the query encoder alone."},
    )

    def __post_init__(self) -> None:
        if self.rank_by not in RANK_BY:
            raise ValueError(f"rank_by must be one of {', '.join(RANK_BY)}, got {self.rank_by!r}")
        if self.depth < 1:
            raise ValueError(f"depth counts documents and must be at least 1, got {self.depth}")
        for name, given in (("metric_cut", self.metric_cut is not None), ("rank_by", self.rank_by != "list")):
            if given and self.loss_type != "adore":
                raise ValueError(f"{name} is for adore, got loss_type={self.loss_type}; leave it out")
        super().__post_init__()
        if self.model_kind not in ("auto", "bi_encoder"):
            raise ValueError(f"an index is searched with a bi-encoder, got model_kind={self.model_kind}")
        for name in ("in_batch", "mini_batch_size", "mini_batch_num_tokens", "kl_weight"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is for lists that are known and documents that are embedded, and here lists are found "
                    "and only queries embedded; leave it out"
                )
        if isinstance(self.prompts, Mapping) and set(self.prompts) - {"query"}:
            raise ValueError(f"only queries are embedded: prompts may have query, got {self.prompts!r}")
        if self.places is not None and self.places > self.depth:
            raise ValueError(f"k={self.places} places are more than the depth={self.depth} documents of a list")

    def objective_settings(self) -> dict[str, Any]:
        """Hyper-parameters of the objective that were given, and the cut of `adore`."""
        given = super().objective_settings()
        if self.loss_type != "adore":
            return given
        return {"metric_cut": self.depth if self.metric_cut is None else self.metric_cut, **given}

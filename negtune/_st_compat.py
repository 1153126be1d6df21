"""Every sentence-transformers name this project leans on that is not in its public documentation; `tests/contracts`
pins them.

- `CachedLossMixin`: GradCache in two passes with replayed random states; `embed_minibatch` and `calculate_loss` are
  ours. `RandContext`, `create_minibatch`: such a state, and a part of a batch.
- `embed_columns`: like-wide columns in one forward pass.
- `Module`, `Normalize`: a part of an encoder, and the one that throws the norm away.
- `BaseTrainer`, `BaseTrainingArguments`, `BaseEvaluator`: what the trainers of its kinds of model share.
"""

from __future__ import annotations

try:
    import sentence_transformers
except ModuleNotFoundError as error:
    if error.name != "sentence_transformers":
        raise
    raise ModuleNotFoundError(
        "training retrievers needs sentence-transformers; run: pip install 'negtune[retrieval]'", name=error.name
    ) from None
from packaging.version import Version

if not Version("6.2") <= Version(sentence_transformers.__version__) < Version("7"):
    raise ImportError(
        "negtune is tested with sentence-transformers>=6.2,<7 and found "
        f"{sentence_transformers.__version__}; run: pip install 'sentence-transformers>=6.2,<7'"
    )

from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.losses.gradcache import (
    CachedLossMixin,
    RandContext,
    _create_minibatch,
    has_static_embedding_input,
)
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.base.modules import Module
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.base.trainer import BaseTrainer
from sentence_transformers.base.training_args import BaseTrainingArguments
from sentence_transformers.multi_vector_encoder.model import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.scoring import colbert_scores_pairwise

create_minibatch = _create_minibatch

__all__ = [
    "BaseEvaluator",
    "BaseTrainer",
    "BaseTrainingArguments",
    "CachedLossMixin",
    "Module",
    "MultiVectorEncoder",
    "Normalize",
    "RandContext",
    "colbert_scores_pairwise",
    "create_minibatch",
    "embed_columns",
    "has_static_embedding_input",
]

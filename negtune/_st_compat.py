"""Every sentence-transformers name this project leans on that is not in its public documentation; `tests/contracts`
pins them.

- `CachedLossMixin`: GradCache in two passes with replayed random states; `embed_minibatch` and `calculate_loss` are
  ours. `RandContext`, `create_minibatch`: such a state, and a part of a batch.
- `embed_columns`: like-wide columns in one forward pass.
- `BaseTrainer`, `BaseTrainingArguments`, `BaseEvaluator`: what the trainers of its kinds of model share.
- `load_with_modules`: a saved model with modules that are not of sentence-transformers, without running its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
from sentence_transformers.base.modules import Module, Normalize
from sentence_transformers.base.trainer import BaseTrainer
from sentence_transformers.base.training_args import BaseTrainingArguments
from sentence_transformers.multi_vector_encoder.model import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.scoring import colbert_scores_pairwise
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

create_minibatch = _create_minibatch


def load_with_modules(name_or_path: str, modules: Mapping[str, type[Module]], **settings: Any) -> Any:
    """A SentenceTransformer, with the classes of `modules` where its `modules.json` has their keys as type.

    The public way to a module of another package is `trust_remote_code=True`, which runs any code that a folder names.
    """
    return sentence_transformers.SentenceTransformer._load_with_module_classes(name_or_path, modules, **settings)


__all__ = [
    "BaseEvaluator",
    "BaseTrainer",
    "BaseTrainingArguments",
    "CachedLossMixin",
    "Module",
    "MultiVectorEncoder",
    "Normalize",
    "RandContext",
    "StaticEmbedding",
    "colbert_scores_pairwise",
    "create_minibatch",
    "embed_columns",
    "has_static_embedding_input",
    "load_with_modules",
]

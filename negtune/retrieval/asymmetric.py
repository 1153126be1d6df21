"""Containment: an encoder whose vectors have a length that means something, and the loss that teaches it.

Most encoders end in mean pooling and a `Normalize`: the first lets the norm shrink with content, the second throws it
away. `MagnitudeHead` gives it back, without touching the direction, so that cosines stay what they were.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negtune._st_compat import Module, Normalize, has_static_embedding_input
from negtune.losses.asymmetric import norm_ratio, norms
from negtune.losses.ranking import infonce
from negtune.records import read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PROBE_LENGTHS = (1, 8, 24)


class MagnitudeHead(Module):
    """Gives the sentence vector a length: the sum over its tokens of softplus(w h_t + b), h_t what the transformer says
    of the token. It goes behind pooling.

    A sum and no mean, so that more text can be more; at the start (w = 0, b = 0) it is log 2 times the number of
    tokens. The direction is left alone.

    Args:
        in_features: width of the token embeddings.
    """

    config_keys = ["in_features"]

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.amount = nn.Linear(in_features, 1)
        nn.init.zeros_(self.amount.weight)
        nn.init.zeros_(self.amount.bias)

    def forward(self, features: MutableMapping[str, Any], **kwargs: Any) -> MutableMapping[str, Any]:
        """Changes `sentence_embedding`; reads `token_embeddings` and `attention_mask`."""
        tokens, padding = features["token_embeddings"], features["attention_mask"] == 0
        amounts = F.softplus(self.amount(tokens).squeeze(-1)).masked_fill(padding, 0.0).sum(-1, keepdim=True)
        features["sentence_embedding"] = F.normalize(features["sentence_embedding"], dim=-1) * amounts
        return features

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Configuration and weights, as safetensors."""
        self.save_config(output_path)
        self.save_torch_weights(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> MagnitudeHead:
        """What `save` wrote."""
        where = {k: kwargs.get(k) for k in ("token", "cache_folder", "revision")}
        where |= {"subfolder": subfolder, "local_files_only": kwargs.get("local_files_only", False)}
        model = cls(**cls.load_config(model_name_or_path=model_name_or_path, **where))
        return cls.load_torch_weights(model_name_or_path=model_name_or_path, model=model, **where)


def add_magnitude(model: SentenceTransformer) -> SentenceTransformer:
    """The same encoder, with a `MagnitudeHead` at the end instead of its `Normalize`; weights are shared.

    Raises:
        ValueError: a static embedding, which has no tokens to weigh.
    """
    if has_static_embedding_input(model):
        raise ValueError(
            "a static embedding has no token embeddings to read a magnitude from; use a transformer encoder"
        )
    from sentence_transformers import SentenceTransformer

    kept = [module for module in model if not isinstance(module, Normalize)]
    first = next(model.parameters())
    head = MagnitudeHead(model[0].get_embedding_dimension()).to(device=first.device, dtype=first.dtype)
    return SentenceTransformer(
        modules=[*kept, head], device=str(model.device), prompts=model.prompts, similarity_fn_name="cosine"
    )


def load_with_magnitude(folder: str | os.PathLike, *, device: str | None = None) -> SentenceTransformer:
    """A model that `add_magnitude` made and that was saved.

    sentence-transformers reads modules that are not its own with `trust_remote_code` only. That is given here behind a
    look into the folder: no code is in it, nothing in it asks for any, and the one foreign module is `MagnitudeHead`.

    Raises:
        ValueError: the folder holds code, or asks for it.
    """
    from sentence_transformers import SentenceTransformer

    for path in sorted(Path(folder).rglob("*")):
        if path.suffix == ".py" or (path.suffix == ".json" and '"auto_map"' in path.read_text(encoding="utf-8")):
            raise ValueError(f"{path} is code, or asks for it, which is not run; take it out of the folder")
    modules = read_json(Path(folder) / "modules.json")
    known = ("sentence_transformers.", f"{MagnitudeHead.__module__}.{MagnitudeHead.__name__}")
    for module in modules:
        if not module["type"].startswith(known):
            raise ValueError(f"{folder} has a module {module['type']}, whose code is not run")
    return SentenceTransformer(str(folder), device=device, trust_remote_code=True, local_files_only=True)


class NormRatioLoss(nn.Module):
    """For `SentenceTransformerTrainer` on pairs (part, whole): InfoNCE of the cosines within the batch, plus `weight`
    times `norm_ratio` with the whole as the larger.

    The two do not fight over a vector: one turns it, the other changes its length.

    Args:
        model: whose norms are free; see `add_magnitude`.
        weight: of the norm-ratio loss.
        margin: ratio of norms that is enough.
        scale: of the cosines.

    Raises:
        ValueError: at construction, an encoder whose vectors all have one length.
    """

    def __init__(
        self, model: SentenceTransformer, *, weight: float = 1.0, margin: float | None = 1.5, scale: float = 20.0
    ) -> None:
        super().__init__()
        refuse_constant_norms(model)
        self.model, self.weight, self.margin, self.scale = model, weight, margin, scale

    def forward(self, sentence_features: Iterable[Mapping[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Mean over the pairs of the batch."""
        parts, wholes = (self.model(dict(features))["sentence_embedding"] for features in sentence_features)
        scores = self.scale * F.normalize(parts.float(), dim=-1) @ F.normalize(wholes.float(), dim=-1).T
        own = torch.eye(len(scores), device=scores.device)
        contrast = infonce(scores, own, torch.ones_like(own, dtype=torch.bool))
        return (contrast + self.weight * norm_ratio(wholes, parts, margin=self.margin)).mean()

    def get_config_dict(self) -> dict[str, Any]:
        """For the host's model card."""
        return {"weight": self.weight, "margin": self.margin, "scale": self.scale}


def refuse_constant_norms(model: SentenceTransformer) -> None:
    """ValueError for an encoder whose vectors have one length, whatever the text: nothing can be learned from it."""
    training = model.training
    words = sorted(model.tokenizer.get_vocab())
    words = words[:: max(1, len(words) // max(PROBE_LENGTHS))]
    probes = [" ".join(words[-n:]) for n in PROBE_LENGTHS]
    found = norms(model.encode(probes, convert_to_tensor=True, show_progress_bar=False))
    model.train(training)
    if float(found.max() / found.min()) < 1.001:
        last = type(list(model)[-1]).__name__
        raise ValueError(
            f"the encoder ends in {last} and gives all vectors the length {float(found[0]):.4g}: norms cannot say how "
            "much a text holds; pass add_magnitude(model)"
        )

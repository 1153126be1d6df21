"""Encoders that tell what is in what: the direction of a vector says what a text is about, its norm how much it holds.

Encoders that end in `Normalize` or a LayerNorm give all texts one norm, and a mean is the shorter the more it is of; a
transformer can learn to turn the latter round, a mean of word vectors cannot. `add_magnitude` gives any model of token
states norms that it can learn, `NormRatioLoss` teaches them, `search_pairs` reads them.

Letters: B texts of a batch, T tokens, H width, Q queries, D documents, P pairs, C candidates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from negtune._st_compat import Module, Normalize, embed_columns
from negtune.losses.asymmetric import (
    asymmetric_similarity,
    contained,
    containment_score,
    norm_ratio,
    unit_vectors,
    vector_norm,
)
from negtune.losses.ranking import infonce
from negtune.ops import at_least_float32
from negtune.retrieval.encoder import encode
from negtune.retrieval.index import ExactIndex

CONSTANT = 1e-3
PROBES = (
    "a cat",
    "the committee met on Tuesday",
    "the committee met on Tuesday to hear what the harbour, the school and the two mills would need before winter",
    "the committee met on Tuesday to hear what the harbour, the school and the two mills would need before winter; it "
    "voted on nothing, since a third of its members were at the fair, and will meet again when the road is open",
)
"""Texts of a few words to a few lines, by whose norms an encoder is known that cannot learn them."""
NORM_BLOCK = 4096


class MagnitudeHead(Module):
    """Gives a sentence vector a learned length: unit vector times the sum over its tokens of softplus(w . token + b).

    A *sum*: each token adds what it holds, so a text holds more than any part of it unless the tokens' states say
    otherwise. It starts at w = 0 and b = 0, .69 a token: the number of tokens, which is a good guess where pairs are
    parts and wholes; training then finds which tokens are worth nothing. Padding counts for nothing, and a prompt
    before the text neither, with special tokens that stand before it; that of a chat template cannot be told from the
    text and counts. So give both sides a prompt, or none.

    The direction, and every cosine, stays what it was. Vectors come out in float32 or wider.

    Args:
        width: of the token states.
    """

    config_keys: list[str] = ["width"]

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.content = width, nn.Linear(width, 1)
        nn.init.zeros_(self.content.weight)
        nn.init.zeros_(self.content.bias)

    def forward(self, features: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        tokens = at_least_float32(features["token_embeddings"])
        with torch.autocast(tokens.device.type, enabled=False):
            magnitudes = self._magnitudes(tokens, features)
            features["sentence_embedding"] = unit_vectors(features["sentence_embedding"]) * magnitudes.unsqueeze(-1)
        return features

    def _magnitudes(self, tokens: Tensor, features: Mapping[str, Any]) -> Tensor:
        """[B]."""
        prompt = features.get("prompt_length", 0)
        prompt = int(prompt.flatten()[0]) if isinstance(prompt, Tensor) else prompt  # the same for all of a batch
        if "cu_seq_lens_q" in features:  # flash attention's texts, one after another in one row
            starts = features["cu_seq_lens_q"][:-1]
            lengths = features["cu_seq_lens_q"].diff()
            texts = torch.arange(len(lengths), device=tokens.device).repeat_interleave(lengths)
            places = torch.arange(len(texts), device=tokens.device) - starts[texts]
            content = self._content(tokens.squeeze(0)).masked_fill(places < prompt, 0.0)
            return tokens.new_zeros(len(lengths)).index_add(0, texts, content)
        mask = features["attention_mask"].bool()
        mask = mask & (mask.cumsum(-1) > prompt)
        return self._content(tokens.masked_fill(~mask.unsqueeze(-1), 0.0)).masked_fill(~mask, 0.0).sum(-1)

    def _content(self, tokens: Tensor) -> Tensor:
        weight, bias = self.content.weight.to(tokens.dtype), self.content.bias.to(tokens.dtype)
        return F.softplus(F.linear(tokens, weight, bias)).squeeze(-1)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> MagnitudeHead:
        places = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where = {name: kwargs[name] for name in places if name in kwargs}
        head = cls(**cls.load_config(model_name_or_path, *args, **where))
        return cls.load_torch_weights(model_name_or_path, *args, **where, model=head)


MODULES: dict[str, type[Module]] = {f"{MagnitudeHead.__module__}.{MagnitudeHead.__name__}": MagnitudeHead}
"""What `load_encoder` reads without running code of the folder."""


def add_magnitude(model: Any) -> Any:
    """Put a `MagnitudeHead` at the end of a SentenceTransformer, in the place of a `Normalize` that stands there.

    Cosines stay as they are, and cosine becomes the model's similarity. Saved, it is loaded by `load_encoder`, or by
    `SentenceTransformer(folder, trust_remote_code=True)`. `encode(..., normalize_embeddings=True)` and `truncate_dim`
    take off what the head has put on.

    Args:
        model: a SentenceTransformer that pools the states of tokens; it is changed and returned.

    Raises:
        ValueError: it has no states of tokens, or has a head already.
    """
    if any(isinstance(module, MagnitudeHead) for module in model):
        raise ValueError("the model has a MagnitudeHead already; train that one")
    states = _outputs(model, PROBES[0]).get("token_embeddings")
    if states is None:
        raise ValueError(
            f"a magnitude is learned from states of tokens, which {type(model[0]).__name__} does not give; take a "
            "model of Transformer and Pooling"
        )
    if isinstance(model[-1], Normalize):
        del model[-1]
    first = next(model.parameters())
    model.append(MagnitudeHead(states.shape[-1]).to(first.device, first.dtype if first.is_floating_point() else None))
    model.similarity_fn_name = "cosine"
    return model


class NormRatioLoss(nn.Module):
    """InfoNCE of cosines with in-batch negatives + weight * exp(1 - |larger| / |smaller|), asymmetrical-similarity
    learning for the stock `SentenceTransformerTrainer`.

    Columns, in this order and whatever their names: the smaller text, and the larger one that contains it. The first
    term turns the vectors (each pair towards each other, away from the larger texts of other pairs), the second makes
    them longer or shorter; in the space of vectors their gradients are orthogonal, in the weights they meet.

    Reduction: both are means over pairs, logged as `contrastive` and `norm_ratio`; the trainer averages over
    accumulation steps. Texts must not come twice in a batch: `batch_sampler="no_duplicates"`.

    Args:
        model: a SentenceTransformer.
        weight: of the norm-ratio loss; at 0 the norms are not trained.
        margin: see `losses.asymmetric.norm_ratio`.
        scale: cosines are multiplied by it, as in MultipleNegativesRankingLoss.
        probes: at least two texts of different length, in words the model knows, by which constant norms are noticed.

    Raises:
        ValueError: an encoder whose norms are constant: nothing to train, the gradient is zero or noise.

    https://arxiv.org/abs/2205.12358
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float = 1.0,
        margin: float | None = None,
        scale: float = 20.0,
        probes: Sequence[str] = PROBES,
    ) -> None:
        super().__init__()
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight must be at least 0 and finite, got {weight}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        norm_ratio(torch.ones(1, 1), torch.ones(1, 1), margin=margin)  # a bad margin is told of here
        _refuse_constant_norms(model, probes)
        self.model, self.weight, self.margin, self.scale = model, weight, margin, scale

    def forward(self, sentence_features: Iterable[Any], labels: Any = None) -> dict[str, Tensor]:
        features = list(sentence_features)
        if len(features) != 2:
            raise ValueError(f"need two columns, the smaller and the larger text, got {len(features)}")
        smaller, larger = embed_columns(self.model, features)
        with torch.autocast(smaller.device.type, enabled=False):
            cosines = asymmetric_similarity(smaller, larger, weight=0.0)
            own = torch.eye(len(cosines), dtype=cosines.dtype, device=cosines.device)
            everything = torch.ones_like(cosines, dtype=torch.bool)
            return {
                "contrastive": infonce(cosines, own, everything, temperature=1 / self.scale).mean(),
                "norm_ratio": self.weight * norm_ratio(larger, smaller, margin=self.margin).mean(),
            }


@dataclass(frozen=True)
class Pairs:
    """Pairs found, best first.

    Args:
        queries, documents: positions.
        scores: asymmetric similarity in the direction of the pair.
        query_inside: True: the query is in the document; False: the document is in the query.
    """

    queries: Int[Tensor, " P"]
    documents: Int[Tensor, " P"]
    scores: Float[Tensor, " P"]
    query_inside: Bool[Tensor, " P"]


def search_pairs(
    queries: Float[Tensor, "Q H"],
    documents: Float[Tensor, "D H"],
    *,
    k: int = 10,
    threshold: float = -math.inf,
    weight: float = 1.0,
    ratio: float | None = None,
    candidates: int = 100,
    max_bytes: int = 16 * 2**20,
) -> Pairs:
    """Which queries are in which documents, and which documents in which queries.

    Candidates come by cosine from `ExactIndex`, in fixed memory, and are scored both ways. No score is above its
    cosine, so what is missing is behind the last candidate's cosine.

    Args:
        queries, documents: vectors before normalisation, of one encoder.
        k: pairs of each query and direction, at most.
        threshold: least score.
        weight: of `asymmetric_similarity`; 0: scores are cosines.
        ratio: of `containment_filter`, by which pairs are discarded; None: none are. The published rule is
            `weight=0, ratio=1`.
        candidates: of each query. A warning tells where there are more above `threshold`.
        max_bytes: of the search; it changes the time only.
    """
    if k < 1:
        raise ValueError(f"k counts pairs of a query and must be at least 1, got {k}")
    if math.isnan(threshold):
        raise ValueError("threshold is the least score of a pair, got nan")
    index = ExactIndex(documents, [str(i) for i in range(len(documents))], "cosine")
    cosines, positions = index.search(queries, max(k, candidates), max_bytes=max_bytes)
    _tell_of_more(cosines, len(documents), threshold)

    def best(smaller: Tensor, larger: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, documents and scores [P] of the direction in which these norms, [Q 1] and [Q C], are to grow."""
        scores = containment_score(cosines, smaller, larger, weight=weight)
        if ratio is not None:
            scores = scores.masked_fill(~contained(smaller, larger, ratio=ratio), -math.inf)
        order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        scores = scores.gather(-1, order)
        rows, places = ((scores > -math.inf) & (scores >= threshold)).nonzero(as_tuple=True)
        return rows, positions[rows, order[rows, places]], scores[rows, places]

    query_norms, document_norms = _norms(queries)[:, None], _norms(documents)[positions]
    inside, around = best(query_norms, document_norms), best(document_norms, query_norms)
    rows, columns, scores = (torch.cat(parts) for parts in zip(inside, around, strict=True))
    order = scores.sort(descending=True, stable=True).indices
    return Pairs(rows[order], columns[order], scores[order], order < len(inside[0]))


def _tell_of_more(cosines: Tensor, n_documents: int, threshold: float) -> None:
    if threshold == -math.inf or cosines.shape[1] == n_documents:
        return
    more = int((cosines[:, -1] >= threshold).sum())
    if more:
        warnings.warn(
            f"{more} of {len(cosines)} queries may have pairs above {threshold} beyond their {cosines.shape[1]} "
            "candidates; raise candidates",
            stacklevel=3,
        )


def _norms(vectors: Tensor) -> Tensor:
    """On the CPU, in blocks: the copies are as large as the vectors."""
    return torch.cat([vector_norm(block.detach()).cpu() for block in vectors.split(NORM_BLOCK)])


def _outputs(model: Any, text: str) -> Mapping[str, Any]:
    training = model.training
    features = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in model.preprocess([text]).items()}
    try:
        with torch.no_grad():
            return model.eval()(features)
    finally:
        model.train(training)


def _refuse_constant_norms(model: Any, probes: Sequence[str]) -> None:
    norms = vector_norm(encode(model, probes))
    if norms.max() - norms.min() > CONSTANT * norms.max():
        return
    why = "as after a LayerNorm"
    if isinstance(model[-1], Normalize):
        why = "it ends in Normalize"
    elif isinstance(model[-1], MagnitudeHead):
        why = "as where texts are equally long, or cut at max_seq_length"
    raise ValueError(
        f"the encoder gives all {len(probes)} probe texts the norm {norms.mean():.4g}, {why}: nothing to train; "
        "add_magnitude(model) gives it norms that it can learn (if it lacks the words of the probes, pass probes=)"
    )

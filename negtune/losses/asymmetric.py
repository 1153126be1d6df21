"""Asymmetrical-similarity learning: how much a text holds is the norm of its vector, what it is about the direction.

A crop is a copy of the whole and the whole none of the crop, a quotation is in its source and the source not in it: no
symmetric similarity can say so. Here the smaller is *contained* in the larger, and has the smaller norm.

Shapes: B pairs, Q queries, D documents, H width, `*A` anything. Norms are float32 or wider and taken at a scale where
squares neither over- nor underflow. A zero vector holds nothing: it has cosine 0 with everything, norms are compared as
if its were the smallest normal number, and it takes no gradient.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from negtune.ops import at_least_float32

LARGEST_RATIO = 1000.0
"""exp(1 - 1000) is 0 in float64 too: nothing is lost where ratios end, and 0 times infinity does not come up."""


def norm_ratio(
    larger: Float[Tensor, "B H"], smaller: Float[Tensor, "B H"], *, margin: float | None = None
) -> Float[Tensor, " B"]:
    """Norm-ratio loss of asymmetrical-similarity learning: exp(1 - |larger| / |smaller|).

    The gradient is -L / |smaller| along the larger text's vector and +L |larger| / |smaller|^2 along the smaller's: the
    norm of what is contained shrinks, that of what contains it grows, and neither changes its direction. So it is
    orthogonal to the gradient of any loss of cosines, and scaling both vectors changes nothing.

    Args:
        larger, smaller: vectors *before* normalisation of the text that holds more, and of the one that is in it.
        margin: ratio of the norms from which on a pair says nothing: max(0, exp(1 - ratio) - exp(1 - margin)). 1 asks
            for the order alone, as `containment_filter` reads it. None, as published, pushes norms apart for ever,
            ever less: the loss is 1 at equal norms, .37 at a ratio of 2, .02 at 5, and never above e.

    Reduction: mean over pairs. https://arxiv.org/abs/2205.12358
    """
    ratio = _log_ratio(vector_norm(larger), vector_norm(smaller)).clamp(max=math.log(LARGEST_RATIO)).exp()
    losses = torch.exp(1 - ratio)
    if margin is None:
        return losses
    if not 0 < margin < math.inf:
        raise ValueError(f"margin is a ratio of norms, positive and finite, got {margin}; for none leave it out")
    return (losses - math.exp(1 - margin)).clamp(min=0)


def asymmetric_similarity(
    queries: Float[Tensor, "Q H"], documents: Float[Tensor, "D H"], *, weight: float = 1.0
) -> Float[Tensor, "Q D"]:
    """How far a query is in a document: cos(q, d) + weight * min(0, log(|d| / |q|)).

    The published filter made soft: a document that holds less than the query loses in proportion to how much less, one
    that holds more gains nothing. Scores of one pair the two ways round differ whenever its norms do.

    Without the min the norm of the query would be a constant of its ranking, and the rest a prior of the document: an
    asymmetric score that no list of one query shows. Compare pairs of different queries by it, as micro-AP and
    thresholds do.

    Args:
        queries, documents: vectors before normalisation.
        weight: at least 0. 0 is the cosine; towards infinity it is the hard filter.

    https://arxiv.org/abs/2205.12358
    """
    cosines = unit_vectors(queries) @ unit_vectors(documents).T
    return containment_score(cosines, vector_norm(queries)[:, None], vector_norm(documents)[None, :], weight=weight)


def containment_filter(
    queries: Float[Tensor, "Q H"], documents: Float[Tensor, "D H"], *, ratio: float = 1.0
) -> Bool[Tensor, "Q D"]:
    """The filter as published: a pair is kept where |q| <= ratio |d|; the others are discarded whatever their cosine.

    Args:
        queries, documents: vectors before normalisation.
        ratio: 1 keeps one direction of each pair, both only where norms are equal. Choose it on held-out pairs: above 1
            copies whose norms are a little off are kept too. At infinity all pairs are.

    https://arxiv.org/abs/2205.12358
    """
    return contained(vector_norm(queries)[:, None], vector_norm(documents)[None, :], ratio=ratio)


def containment_score(
    cosines: Float[Tensor, "*A"],
    query_norms: Float[Tensor, "*#A"],
    document_norms: Float[Tensor, "*#A"],
    *,
    weight: float,
) -> Float[Tensor, "*A"]:
    """`asymmetric_similarity` of pairs whose cosines and norms (`vector_norm`) are known."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be at least 0 and finite, got {weight}; for the hard filter take ratio")
    return cosines + weight * _log_ratio(document_norms, query_norms).clamp(max=0)


def contained(
    query_norms: Float[Tensor, "*#A"], document_norms: Float[Tensor, "*#A"], *, ratio: float
) -> Bool[Tensor, "*A"]:
    """`containment_filter` of pairs whose norms (`vector_norm`) are known."""
    if not ratio > 0:
        raise ValueError(f"ratio must be positive, got {ratio}")
    return query_norms <= ratio * document_norms


def vector_norm(vectors: Float[Tensor, "*A H"]) -> Float[Tensor, "*A"]:
    """Euclidean norms, at least the smallest normal number; a zero vector takes no gradient."""
    vectors = at_least_float32(vectors)
    tiny = torch.finfo(vectors.dtype).tiny
    scale = vectors.detach().abs().amax(-1, keepdim=True).clamp(min=tiny)
    return (torch.linalg.vector_norm(vectors / scale, dim=-1) * scale.squeeze(-1)).clamp(min=tiny)


def unit_vectors(vectors: Float[Tensor, "*A H"]) -> Float[Tensor, "*A H"]:
    """Directions; a zero vector stays one and takes no gradient."""
    zero = (vectors == 0).all(-1, keepdim=True)
    return (at_least_float32(vectors) / vector_norm(vectors).unsqueeze(-1)).masked_fill(zero, 0.0)


def _log_ratio(above: Tensor, below: Tensor) -> Tensor:
    return above.log() - below.log()

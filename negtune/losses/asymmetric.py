"""Similarity with a direction: a part is contained in the whole, the whole is not contained in the part.

The direction of a vector says what a text is about, its length how much of it there is. Shapes: B pairs, Q queries, D
documents, H width of a vector.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from negtune.losses.ranking import refuse_not_positive
from negtune.ops import at_least_float32

SMALLEST_NORM = 1e-12


def norm_ratio(
    larger: Float[Tensor, "B H"], smaller: Float[Tensor, "B H"], *, margin: float | None = None
) -> Float[Tensor, " B"]:
    """Norm-ratio loss of asymmetrical-similarity learning: exp(1 - ||f_a||/||f_b||), a the view with more content.

    The gradient is radial, -L/||f_b|| along f_a and +L ||f_a||/||f_b||^2 along f_b: it lengthens the larger, shortens
    the smaller, turns neither, and so is orthogonal to that of any loss of their cosine. Its value is 1 at equal norms,
    e at most, and never 0: the ratio grows for ever. With a `margin` it is [exp(1 - ratio) - exp(1 - margin)]_+, the
    same gradient until the ratio reaches the margin, and none beyond.

    Args:
        larger, smaller: not normalised.
        margin: ratio of norms that is enough, above 0; 1.5, say.

    Reduction: mean over pairs. https://arxiv.org/abs/2205.12358
    """
    losses = torch.exp(1 - norms(larger) / norms(smaller))
    if margin is None:
        return losses
    refuse_not_positive(margin=margin)
    return F.relu(losses - math.exp(1 - margin))


def asymmetric_similarity(
    queries: Float[Tensor, "Q H"], documents: Float[Tensor, "D H"], *, weight: float = 1.0
) -> Float[Tensor, "Q D"]:
    """cos(q, d) + weight min(0, log ||d||/||q||): a document that holds less than the query is no copy of it.

    For one query the second term only puts small documents back, whatever they say: it shows where pairs of *different*
    queries are compared or cut at a threshold, and between s(q, d) and s(d, q). weight -> infinity: `contains` with
    ratio 1. A zero vector has cosine 0 with everything.

    https://arxiv.org/abs/2205.12358 has the hard filter only; this form is ours.
    """
    cosines = _unit(queries) @ _unit(documents).T
    logs = norms(documents).log() - norms(queries).log().unsqueeze(-1)
    return cosines + weight * logs.clamp(max=0)


def contains(
    queries: Float[Tensor, "Q H"], documents: Float[Tensor, "D H"], *, ratio: float = 1.0
) -> Bool[Tensor, "Q D"]:
    """The published filter: ||q|| <= ratio ||d||, whether the document can hold the query.

    Of two texts with different norms it keeps one direction at ratio 1; above, both where norms are close.
    """
    refuse_not_positive(ratio=ratio)
    return norms(queries).unsqueeze(-1) <= ratio * norms(documents)


def _unit(vectors: Tensor) -> Tensor:
    """Of length 1; zero vectors stay, and get no gradient."""
    lengths = norms(vectors).unsqueeze(-1)
    return at_least_float32(vectors) / lengths.masked_fill(lengths <= SMALLEST_NORM, torch.inf)


def norms(vectors: Float[Tensor, "B H"]) -> Float[Tensor, " B"]:
    """Lengths in float32 or wider, at least 1e-12."""
    return at_least_float32(vectors).norm(dim=-1).clamp(min=SMALLEST_NORM)

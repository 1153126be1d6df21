"""The Plackett-Luce policy over rankings of a list, and gradients of what its rankings earn.

A ranking draws documents one after another, each with probability proportional to exp(score) among those that are
left: pi(r) = prod_j exp(s_{r_j}) / Z_j with Z_j the sum of exp(s) over what is not placed before j. Training climbs
the expected reward sum_r pi(r) Delta(r); at test time documents are sorted by score and nothing is drawn.

Shapes: Q queries, D documents of the longest list, N sampled rankings, k places that count, I judged documents.
Documents behind the mask are padding: they are never drawn, and nothing they hold reaches a result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from negtune.metrics.ranking import ADDITIVE, METRICS, exponential_gain, greedy_reward, ideal_value, place_rewards
from negtune.ops import at_least_float32

ESTIMATORS = ("pl_rank", "pl_rank_loo", "rtg_loo", "loo", "reinforce")
RewardFunction = Callable[[Tensor], Tensor]
"""`rankings [N Q k] -> rewards [N Q]`: documents by their place in the list, best first; NaN is unscored."""


def plackett_luce_logps(
    scores: Float[Tensor, "*A D"], rankings: Int[Tensor, "*A D"], mask: Bool[Tensor, "*A D"], *, k: int | None = None
) -> Float[Tensor, "*A"]:
    """log pi(r) of the first `k` places, sum_{j<=k} s_{r_j} - log Z_j; of the whole ranking by default.

    Args:
        scores: of the documents of a list.
        rankings: documents, best first; padding behind all others.
        mask: True where a document is no padding.
        k: places.

    Returns:
        Nats; 0 for an empty list. Differentiable in `scores`.
    """
    return place_logps(scores, rankings, mask)[..., :k].sum(-1)


def place_logps(
    scores: Float[Tensor, "*A D"], rankings: Int[Tensor, "*A D"], mask: Bool[Tensor, "*A D"]
) -> Float[Tensor, "*A D"]:
    """log pi(r_j | r_<j) = s_{r_j} - log Z_j of each place; 0 for padding. Arguments as in `plackett_luce_logps`."""
    placed = without_padding(scores, mask).gather(-1, rankings)
    return (placed - _log_rest(placed)).masked_fill(~mask.gather(-1, rankings), 0.0)


def sample_rankings(
    scores: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    n_samples: int,
    *,
    k: int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "N Q k"]:
    """Exact draws from the Plackett-Luce policy: documents by score plus Gumbel noise, the first `k` of them.

    Padding comes after all documents. The noise is drawn on the generator's device, for padding too.
    """
    device = generator.device if generator is not None else scores.device
    uniform = torch.rand(n_samples, *scores.shape, dtype=scores.dtype, device=device, generator=generator)
    gumbel = uniform.clamp_(min=torch.finfo(scores.dtype).tiny).log_().neg_().log_().neg_()
    keys = gumbel.to(scores.device).add_(scores.detach()).masked_fill_(~mask, -torch.inf)
    k = k or scores.shape[-1]
    if keys.device.type != "cpu":
        return keys.topk(k, -1).indices
    return torch.from_numpy(keys.neg_().numpy().argsort(-1)[..., :k].copy())  # four times as fast as torch's sort


@dataclass(frozen=True)
class PolicyGradient:
    """One estimate of the gradient of the expected reward; what the samples say of the policy is computed when asked.

    Args:
        loss: minus the mean sampled reward in value, minus the estimate in gradient; with the bonus for entropy and the
            cost of KL, where asked for.
        rewards: of each sampled ranking; NaN where a reward function could not score it.
        gradient: the estimate itself, by score over temperature.
    """

    loss: Float[Tensor, " Q"]
    rewards: Float[Tensor, "N Q"]
    gradient: Float[Tensor, "Q D"]
    _policy: Tensor
    _drawn: _Drawn
    _earned: _Earned
    _samples: _Samples
    _least: int = 1

    @cached_property
    def scored(self) -> Bool[Tensor, " Q"]:
        """True where enough rankings were scored for an estimate: one, or for `loo`, which compares them, two."""
        return (~self.rewards.isnan()).sum(0) >= self._least

    @cached_property
    def greedy(self) -> Float[Tensor, " Q"] | None:
        """Reward of the ranking by score, equal scores in the worst order; None for a reward function."""
        found = None if self._earned.greedy is None else self._earned.greedy(self._policy)
        return None if found is None else found.to(self.gradient.dtype)

    @cached_property
    def entropy(self) -> Float[Tensor, " Q"]:
        """Of the policy's first place, in nats."""
        return first_place_entropy(self._policy, self._drawn.mask)

    @cached_property
    def log_lengths(self) -> Float[Tensor, " Q"]:
        """Log of the number of documents: the entropy of a uniform policy."""
        return self._drawn.mask.sum(-1).clamp(min=1).to(self.gradient.dtype).log()

    @cached_property
    def flat(self) -> Bool[Tensor, " Q"]:
        """True where all sampled rankings earn the same."""
        low = self.rewards.nan_to_num(torch.inf).amin(0)
        high = self.rewards.masked_fill(self.rewards.isnan(), -torch.inf).amax(0)
        return ~(low < high)

    @cached_property
    def variance(self) -> Float[Tensor, " Q"]:
        """Of the estimate, its trace over documents, from the spread of its samples (for the estimators with a
        leave-one-out baseline, whose samples are not independent, an approximation); NaN with one sample."""
        count, each = (~self.rewards.isnan()).sum(0), self._samples.each(self._drawn, self._earned.units)
        spread = each.square().sum((0, -1)) - count * self.gradient.to(each.dtype).square().sum(-1)
        return (spread.clamp(min=0) / (count * (count - 1))).to(self.gradient.dtype)


def policy_gradient(
    scores: Float[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    *,
    k: int = 10,
    n_samples: int = 16,
    estimator: str | None = None,
    metric: str = "ndcg",
    gain: str = "linear",
    reward_fn: RewardFunction | None = None,
    ideal_gains: Float[Tensor, "Q I"] | None = None,
    temperature: float = 1.0,
    entropy_weight: float = 0.0,
    kl_weight: float = 0.0,
    ref_scores: Float[Tensor, "Q D"] | None = None,
    generator: torch.Generator | None = None,
) -> PolicyGradient:
    """Estimate the gradient of the expected reward of rankings drawn with the scores; see `ranking.pg_rank`."""
    for name, weight in (("entropy_weight", entropy_weight), ("kl_weight", kl_weight)):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name} must be at least 0 and finite, got {weight}")
    if kl_weight and ref_scores is None:
        raise ValueError("kl_weight needs ref_scores, the scores of the warm start")
    estimator = _checked(scores, k, n_samples, estimator, metric, reward_fn, temperature)
    logits = at_least_float32(scores) / temperature
    if bool((logits.detach().isnan() & mask).any()):
        row = int((logits.detach().isnan() & mask).any(-1).nonzero()[0])
        raise ValueError(
            f"the scores of list {row} of the batch have NaN; the model has diverged, or its input was bad"
        )
    with torch.no_grad():
        policy = logits.detach().masked_fill(~mask, -torch.inf)
        drawn = _Drawn(policy, mask, sample_rankings(policy, mask, n_samples, k=k, generator=generator))
        earned = (
            _by_metric(drawn, gains, ideal_gains, metric, gain) if reward_fn is None else _by_function(drawn, reward_fn)
        )
        samples = _gradients(estimator, drawn, earned)
        count = (~earned.rewards.isnan()).sum(0).clamp(min=1)
        gradient = (samples.sum(drawn, earned.units) / count.unsqueeze(-1)).to(logits.dtype)
        mean_reward = earned.rewards.nan_to_num(0.0).sum(0) / count
    surrogate = (logits.masked_fill(~mask, 0.0) * gradient).sum(-1)
    loss = -(mean_reward.to(logits.dtype) + surrogate - surrogate.detach())
    if entropy_weight:
        loss = loss - entropy_weight * first_place_entropy(logits, mask)
    if kl_weight and ref_scores is not None:
        loss = loss + kl_weight * first_place_kl(scores, ref_scores, mask, temperature=temperature)
    least = 2 if estimator == "loo" else 1
    return PolicyGradient(loss, earned.rewards.to(logits.dtype), gradient, policy, drawn, earned, samples, least)


def first_place_entropy(
    scores: Float[Tensor, "Q D"], mask: Bool[Tensor, "Q D"], *, temperature: float = 1.0
) -> Float[Tensor, " Q"]:
    """Entropy of the document that is drawn first, in nats; 0 for an empty list."""
    logps = _first_place(scores, mask, temperature)
    return -(logps.exp() * logps).masked_fill(~mask, 0.0).sum(-1)


def first_place_kl(
    scores: Float[Tensor, "Q D"],
    ref_scores: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " Q"]:
    """KL(policy || reference) of the document that is drawn first, in nats; 0 for an empty list."""
    logps, ref_logps = _first_place(scores, mask, temperature), _first_place(ref_scores.detach(), mask, temperature)
    return (logps.exp() * (logps - ref_logps)).masked_fill(~mask, 0.0).sum(-1)


# --- Credit -----------------------------------------------------------------------------------------------------------


class _Drawn:
    """Sampled rankings, and the strengths exp(s) of documents up to a factor per list.

    In float64, where a score may be 700 below the best of its list; lower ones count as 700 below. Sums have positive
    terms only: what is left at a place is added up, never subtracted from the whole.

    Args:
        policy: logits `[Q D]`, -inf for padding.
        mask: True where a document is no padding.
        rankings: the first k places `[N Q k]`.
    """

    def __init__(self, policy: Tensor, mask: Tensor, rankings: Tensor) -> None:
        self.dtype, lowest = (torch.float64, -700.0) if policy.device.type != "mps" else (torch.float32, -80.0)
        behind = (policy - policy.amax(-1, keepdim=True)).to(self.dtype).clamp(min=lowest)
        strengths = behind.exp().masked_fill(~mask, 0.0).expand(len(rankings), -1, -1)
        self.mask, self.rankings, self.real = mask, rankings, mask.expand_as(strengths).gather(-1, rankings)
        self.placed = strengths.gather(-1, rankings)
        self.unplaced = strengths.scatter(-1, rankings, 0.0)
        self.rest = self.to_go(self.placed) + self.unplaced.sum(-1, keepdim=True)  # Z_j

    @staticmethod
    def to_go(values: Tensor) -> Tensor:
        """sum_{m >= j} of `[N Q k]`."""
        return values.flip(-1).cumsum(-1).flip(-1)

    def shares(self, amounts: Tensor) -> tuple[Tensor, Tensor]:
        """sum_{j<=m} a_j e^{s_m} / Z_j for the documents at place m `[N Q k]`; for those not placed, where the sum has
        all k terms, the sum without e^s `[N Q]`. Amounts `[N Q k]`."""
        sums = (amounts / self.rest).masked_fill(~self.real, 0.0).cumsum(-1)
        return self.placed * sums, sums[..., -1]


@dataclass(frozen=True)
class _Samples:
    """The gradient of every sample, written short: what is not placed differs by its strength and its rho only.

    Args:
        placed: of the document at each place `[N Q k]`.
        gained, lost: of a document that is not placed, e^s (rho gained - lost), `[N Q]`; no gained: 0.
    """

    placed: Tensor
    lost: Tensor
    gained: Tensor | None = None

    def sum(self, drawn: _Drawn, units: Tensor | None) -> Tensor:
        """Over samples `[Q D]`; without a tensor of all samples and documents: new memory costs more than sums."""
        factors = torch.stack([self.lost, self.lost if self.gained is None else self.gained], -1)  # [N Q 2]
        lost, gained = (factors.permute(1, 2, 0).contiguous() @ drawn.unplaced.transpose(0, 1)).unbind(1)
        found = -lost if units is None or self.gained is None else units * gained - lost
        rankings, placed = (values.transpose(0, 1).flatten(1) for values in (drawn.rankings, self.placed))
        return found.scatter_add_(-1, rankings, placed)

    def each(self, drawn: _Drawn, units: Tensor | None) -> Tensor:
        """`[N Q D]`."""
        factors = -self.lost.unsqueeze(-1)
        if units is not None and self.gained is not None:
            factors = units * self.gained.unsqueeze(-1) + factors
        return (drawn.unplaced * factors).scatter_(-1, drawn.rankings, self.placed)


@dataclass(frozen=True)
class _Earned:
    """What sampled rankings earn.

    Args:
        rewards: of each `[N Q]`, NaN where not scored.
        greedy: policy `[Q D]` to what its ranking by score earns `[Q]`.
        places: what each place adds `[N Q k]`.
        weights, units: of an additive metric: w `[k]` and rho `[Q D]`, so that a document adds w_j rho_d at place j.
        placed: rho of the document at each place `[N Q k]`.
    """

    rewards: Tensor
    greedy: Callable[[Tensor], Tensor] | None = None
    places: Tensor | None = None
    weights: Tensor | None = None
    units: Tensor | None = None
    placed: Tensor | None = None


def _by_metric(drawn: _Drawn, gains: Tensor, ideal_gains: Tensor | None, metric: str, gain: str) -> _Earned:
    k, mask = drawn.rankings.shape[-1], drawn.mask
    gains = _gains(gains, mask, gain).to(drawn.dtype)
    judged = gains if ideal_gains is None else _gains(ideal_gains, torch.ones_like(ideal_gains).bool(), gain)
    ideal = ideal_value(judged.to(drawn.dtype), metric, k)

    def greedy(policy: Tensor) -> Tensor:
        return greedy_reward(policy, gains, mask, metric, ideal, k)

    if metric not in ADDITIVE:
        places = place_rewards(gains.expand_as(drawn.unplaced).gather(-1, drawn.rankings), metric, ideal)
        return _Earned(places.sum(-1), greedy, places)
    weights = place_rewards(gains.new_ones(1, k), metric, gains.new_ones(1))[0]
    units = place_rewards(gains.T.unsqueeze(-1), metric, ideal).squeeze(-1).T
    placed = units.expand_as(drawn.unplaced).gather(-1, drawn.rankings)
    places = placed * weights
    return _Earned(places.sum(-1), greedy, places, weights, units, placed)


def _by_function(drawn: _Drawn, reward_fn: RewardFunction) -> _Earned:
    rewards = torch.as_tensor(reward_fn(drawn.rankings), dtype=drawn.dtype, device=drawn.rankings.device)
    if rewards.shape != drawn.rankings.shape[:2]:
        raise ValueError(
            "reward_fn must return one reward for each ranking of each query, "
            f"{tuple(drawn.rankings.shape[:2])}, got {tuple(rewards.shape)}"
        )
    return _Earned(rewards.masked_fill(rewards.isinf(), torch.nan))


def _gradients(estimator: str, drawn: _Drawn, earned: _Earned) -> _Samples:
    """Of each sample; zeros where it is not scored."""
    if estimator == "pl_rank":
        return _pl_rank(drawn, earned)
    if estimator == "pl_rank_loo":
        return _pl_rank_loo(drawn, earned)
    if estimator == "rtg_loo":
        assert earned.places is not None
        credit = _minus_others(_Drawn.to_go(earned.places))
    else:
        scored = ~earned.rewards.isnan()
        known = earned.rewards.masked_fill(~scored, 0.0)
        if estimator == "loo":
            others = (scored.sum(0) - 1).clamp(min=1)
            known = (known - (known.sum(0) - known) / others).masked_fill(~scored | (scored.sum(0) < 2), 0.0)
        credit = known.unsqueeze(-1).expand_as(drawn.placed)
    credit = credit.masked_fill(~drawn.real, 0.0)
    placed, lost = drawn.shares(credit)  # sum_{j<=k} c_j d log pi(r_j | r_<j) / d s
    return _Samples(credit - placed, lost)


def _minus_others(values: Tensor) -> Tensor:
    """Of each sample minus the mean of the others, along the first axis."""
    return values - (values.sum(0) - values) / (len(values) - 1)


def _pl_rank(drawn: _Drawn, earned: _Earned) -> _Samples:
    """PL-Rank (Oosterhuis, SIGIR 2021 and 2022): for the document at place m of a sample

    sum_{j=m+1..k} w_j rho_{r_j} + sum_{i=1..min(m,k)} (e^{s_m}/Z_i) (w_i rho_m - sum_{j=i..k} w_j rho_{r_j})
    """
    assert earned.places is not None and earned.weights is not None and earned.placed is not None  # noqa: PT018
    to_go = drawn.to_go(earned.places)
    gained_placed, gained = drawn.shares(earned.weights.expand_as(to_go))
    lost_placed, lost = drawn.shares(to_go)
    return _Samples(to_go - earned.places + earned.placed * gained_placed - lost_placed, lost, gained)


def _pl_rank_loo(drawn: _Drawn, earned: _Earned) -> _Samples:
    """`_pl_rank` with what it leaves to the samples taken out: the expected reward of a place is computed instead of
    drawn, and the rewards behind it are compared with those of the other samples.

    sum_{i=1..min(m,k)} (e^{s_m}/Z_i) (w_i (rho_m - mu_i) - A_{i+1}) + A_{m+1}, where mu_i is the mean of rho over what
    is left at place i, weighted by e^s, and A_{i+1} what is earned behind place i minus the mean of the other samples.
    """
    assert earned.places is not None and earned.weights is not None and earned.placed is not None  # noqa: PT018
    assert earned.units is not None
    advantages = _minus_others(drawn.to_go(earned.places) - earned.places)
    unplaced = (drawn.unplaced.transpose(0, 1) @ earned.units.unsqueeze(-1)).transpose(0, 1)  # e^s rho, added up
    left = drawn.to_go(drawn.placed * earned.placed) + unplaced
    means = left / drawn.rest
    gained_placed, gained = drawn.shares(earned.weights.expand_as(means))
    lost_placed, lost = drawn.shares(earned.weights * means + advantages)
    return _Samples(earned.placed * gained_placed - lost_placed + advantages, lost, gained)


# --- Checks and small things ------------------------------------------------------------------------------------------


def _checked(
    scores: Tensor,
    k: int,
    n_samples: int,
    estimator: str | None,
    metric: str,
    reward_fn: RewardFunction | None,
    temperature: float,
) -> str:
    """The estimator; ValueError where the settings do not go together."""
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"need 1 <= k <= documents of a list, got k={k} and lists of {scores.shape[-1]}")
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
    if estimator is None:
        best = "pl_rank_loo" if n_samples > 1 else "pl_rank"
        estimator = "loo" if reward_fn is not None else best if metric in ADDITIVE else "rtg_loo"
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}")
    if reward_fn is not None and estimator in ("pl_rank", "pl_rank_loo", "rtg_loo"):
        raise ValueError(
            f"{estimator} needs to know what each place earns, and a reward function scores whole rankings; use loo"
        )
    if estimator in ("pl_rank", "pl_rank_loo") and metric not in ADDITIVE:
        raise ValueError(
            f"{estimator} needs a metric that is a sum over documents ({', '.join(sorted(ADDITIVE))}), got {metric}; "
            "use rtg_loo"
        )
    if estimator in ("loo", "rtg_loo", "pl_rank_loo") and n_samples < 2:
        raise ValueError(f"{estimator} compares a ranking with the others and needs n_samples of at least 2, got 1")
    return estimator


def _gains(gains: Tensor, mask: Tensor, gain: str) -> Tensor:
    if gain not in ("linear", "exponential"):
        raise ValueError(f"gain must be linear or exponential, got {gain!r}")
    gains = at_least_float32(gains).masked_fill(~mask, 0.0).clamp(min=0)
    return exponential_gain(gains) if gain == "exponential" else gains


def _log_rest(placed: Tensor) -> Tensor:
    """log Z_j for scores in the order of their places, [... D]."""
    return placed.flip(-1).logcumsumexp(-1).flip(-1)


def _first_place(scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
    return without_padding(at_least_float32(scores) / temperature, mask).log_softmax(-1)


def without_padding(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores with padding as low as a float can be: for -inf, beside which no gradient can pass."""
    scores = at_least_float32(scores)
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 4)

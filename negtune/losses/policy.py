"""Policy-gradient objectives on completions whose tokens, steps or whole carry an advantage.

Shapes: B completions, T completion tokens. Notation: p_t the policy's probability of token t, mu_t that under the
policy that drew it, A_t its advantage, sg(.) a constant for the gradient. All are minimised and return `[B T]`, 0 where
a token's advantage is not known; how those are averaged is the trainer's setting `reduction`.

Every one is a weighted push: the gradient is the sum of -w_t times that of log p_t, and the docstring names w_t.
Negative w pushes down; what differs is how far. A step's advantage stands on all its tokens, so that the push on a step
is its advantage times the gradient of log pi(step | before).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from negtune.losses.preference import step_kto
from negtune.ops import MissingReferenceError, SequenceLogps, TokenCredit, needs, segment_sums, weigh_signs


def reinforce(policy: SequenceLogps, credit: TokenCredit) -> Float[Tensor, "B T"]:
    """REINFORCE: -A_t log p_t.

    Weight A_t, however improbable a negative token already is: on samples of the policy itself it then stops being
    drawn, on a fixed set nothing stops the push.

    https://doi.org/10.1007/BF00992696 (Williams, 1992)
    """
    return _weighted(credit.advantages, policy, credit)


def awr(policy: SequenceLogps, credit: TokenCredit, *, beta: float = 1.0, cap: float = 20.0) -> Float[Tensor, "B T"]:
    """Advantage-weighted regression, or advantage-weighted NLL: -min(exp(A_t/beta), cap) log p_t.

    Weight exp(A_t/beta), at most `cap`, never negative: a bad step is not pushed down, only raised less. With step
    advantages it is the objective whose optimum per-step DPO has, pi_ref exp(A/beta)/Z (2406.14532, theorem 6.1).
    beta -> infinity: plain NLL on all tokens; beta -> 0: only positive tokens, all with weight `cap`.

    https://arxiv.org/abs/1910.00177, equation 5 and section 5 (the cap)
    """
    return _weighted((credit.advantages.double() / beta).exp().clamp(max=cap).to(policy.logps), policy, credit)


def rwr(policy: SequenceLogps, credit: TokenCredit, *, tau: float = 1.0, cap: float = 10.0) -> Float[Tensor, "B T"]:
    """Reward-weighted regression: -min(exp(A/tau), cap) log p_t, A the reward minus the mean of its batch.

    Weight exp(A/tau), at most `cap`, never negative. The baseline is what makes `tau` and `cap` mean the same whatever
    the rewards' origin (exp(r/tau) overflows, and is cut, by a shift of the rewards); between prompts it is not taken
    out, so a prompt with better answers weighs more. tau -> infinity: fine-tuning on all samples; tau -> 0: on those
    above the mean alone, all with weight `cap`.

    https://doi.org/10.1145/1273496.1273590 (Peters and Schaal, 2007); `cap` as in the code of 2404.14367
    """
    return awr(policy, credit, beta=tau, cap=cap)


@needs(reference=True, behaviour=True)
def pmpo(policy: SequenceLogps, credit: TokenCredit, *, alpha: float = 0.5, beta: float = 1.0) -> Float[Tensor, "B T"]:
    """PMPO: -alpha log p_t on positives, +(1 - alpha) log p_t on negatives, and beta KL(pi_ref || pi) on both.

    Only the sign of an advantage is read. Weight alpha on a positive token, -(1 - alpha) on a negative one, and on each
    beta (pi_ref - p_t)/mu_t besides: nothing while the policy is the reference, beta pi_ref/mu_t up once the token
    is gone. On samples of the reference a negative one therefore ends at pi_ref (beta - 1 + alpha)/Z, a positive one at
    pi_ref (beta + alpha)/Z: bad answers are carved out of the reference, not pushed for ever. That takes
    beta > 1 - alpha, so beta > 1 for negatives alone (alpha = 0); with less they go to 0.

    The divergence is that of the next token at each place that mu, the policy that drew, came to. It is estimated on
    the drawn token without bias, and never below 0, as (pi_ref/mu) log(pi_ref/pi) - pi_ref/mu + pi/mu. Expectations run
    over all tokens, so that the shares of positives and negatives weigh as well; the paper's run over each side alone.

    https://arxiv.org/abs/2410.04166, equation 10
    """
    if policy.ref_logps is None:
        raise MissingReferenceError("pmpo needs reference log-probabilities; pass reference= to the trainer")
    positive, negative = (credit.advantages > 0).to(policy.logps), (credit.advantages < 0).to(policy.logps)
    log_ratio = credit.log_ratio(policy).masked_fill(~credit.known, 0.0)
    ref_log_ratio = credit.log_ratio(replace(policy, logps=policy.ref_logps)).masked_fill(~credit.known, 0.0)
    divergence = ref_log_ratio.exp() * (ref_log_ratio - log_ratio) - ref_log_ratio.exp() + log_ratio.exp()
    return _weighted(alpha * positive - (1 - alpha) * negative, policy, credit) + beta * divergence


def psr(policy: SequenceLogps, credit: TokenCredit) -> Float[Tensor, "B T"]:
    """Positive sample reinforcement: -max(A_t, 0) log p_t. With A = 1 it is NLL on what was right.

    Weight 0 on negatives. Diversity falls: what is right already is repeated. https://arxiv.org/abs/2506.01347, eq. 4
    """
    return w_reinforce(policy, credit, positive_weight=1.0, negative_weight=0.0)


def nsr(policy: SequenceLogps, credit: TokenCredit) -> Float[Tensor, "B T"]:
    """Negative sample reinforcement: -min(A_t, 0) log p_t. Only pushes down.

    Weight A_t on negatives, 0 on positives: what a wrong token loses goes to the other tokens in proportion to what
    they have. Meant for samples of the policy itself; the released code clips the ratio besides (`clipped` with
    positive_weight 0). The paper saw it decay after hundreds of steps. https://arxiv.org/abs/2506.01347, eq. 5
    """
    return w_reinforce(policy, credit, positive_weight=0.0, negative_weight=1.0)


def w_reinforce(
    policy: SequenceLogps, credit: TokenCredit, *, positive_weight: float = 0.1, negative_weight: float = 1.0
) -> Float[Tensor, "B T"]:
    """Weighted REINFORCE: `reinforce` with positive advantages times .1: mostly push down, a little up.

    Weight positive_weight A_t or negative_weight A_t. https://arxiv.org/abs/2506.01347, section 5
    """
    weights = weigh_signs(credit.advantages, positive_weight=positive_weight, negative_weight=negative_weight)
    return _weighted(weights, policy, credit)


@needs(behaviour=True)
def topr(policy: SequenceLogps, credit: TokenCredit, *, level: str = "sequence") -> Float[Tensor, "B T"]:
    """Tapered off-policy REINFORCE: -sg(w_t) log p_t, w = A for positives, min(pi/mu, 1) A for negatives.

    A negative completion that the policy has left behind is pushed ever less, so that a fixed set of negatives is
    safe; positives are raised fully however improbable they are. At pi = mu it is `reinforce`.

    Args:
        level: over which tokens pi/mu is taken, as a product: the sequence (the paper), or each step or token alone.

    Ratios are summed over all tokens of the completion, those without a known advantage included.
    https://arxiv.org/abs/2503.14286, equation 7
    """
    log_ratio = segment_sums(credit.log_ratio(policy).detach(), credit.segments(level))
    taper = torch.where(credit.advantages < 0, log_ratio.clamp(max=0.0).exp(), 1.0)
    return _weighted(credit.advantages * taper, policy, credit)


def asymre(policy: SequenceLogps, credit: TokenCredit, *, delta: float = -0.1) -> Float[Tensor, "B T"]:
    """Asymmetric REINFORCE: -(A_t - delta) log p_t, the baseline moved down by |delta|.

    Weight A_t - delta: below the value of the behaviour policy (delta < 0) the push up outweighs the push down, and
    training on samples of an older policy does not collapse; at 0 it is `reinforce`, which did in all the paper's runs.

    `A` is the reward minus the value or mean, not divided by anything. https://arxiv.org/abs/2506.20520
    """
    return _weighted(credit.advantages - delta, policy, credit)


@needs(behaviour=True)
def clipped(
    policy: SequenceLogps,
    credit: TokenCredit,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    level: str = "token",
) -> Float[Tensor, "B T"]:
    """PPO's clipped surrogate: -min(rho A_t, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A_t), rho = pi/mu.

    Weight rho A_t, and 0 once a negative token's rho fell below 1 - epsilon_low or a positive one's rose above
    1 + epsilon_high. A negative token that became *more* likely is pushed with rho A_t without limit, unless
    `delta` caps rho first (two-sided clip). At pi = mu its gradient is that of `reinforce`.

    Args:
        epsilon_low, epsilon_high: DAPO takes .2 and .28.
        delta: largest rho of a negative token; more than 1 + epsilon_high.
        level: token; step or sequence: rho is the geometric mean over the tokens of that segment, with the gradient on
            each token's own part (GSPO-token, https://arxiv.org/abs/2507.18071).

    https://arxiv.org/abs/1707.06347, equation 7
    """
    if delta is not None and delta <= 1 + epsilon_high:
        raise ValueError(
            f"delta={delta:g} must be more than 1 + epsilon_high = {1 + epsilon_high:g}, or it caps positives"
        )
    log_ratio, segments = credit.log_ratio(policy), credit.segments(level)
    if level != "token":
        lengths = segment_sums(policy.mask.to(log_ratio), segments).clamp(min=1)
        mean = segment_sums(log_ratio.detach(), segments) / lengths
        log_ratio = mean + policy.logps - policy.logps.detach()
    ratio = log_ratio.masked_fill(~credit.known, 0.0).exp()  # infinite beside a 0, its gradient would be NaN
    inside = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    advantages = credit.advantages.masked_fill(~credit.known, 0.0)
    return -torch.minimum(ratio * advantages, inside * advantages)


def positive_nll(policy: SequenceLogps, credit: TokenCredit) -> Float[Tensor, "B T"]:
    """-log p_t on the tokens with a positive advantage, 0 elsewhere: the anchor that keeps what is right likely."""
    return (-policy.logps).masked_fill(~credit.positive, 0.0)


def kl_to_reference(policy: SequenceLogps) -> Float[Tensor, "B T"]:
    """k3 estimate of KL(pi || pi_ref) per token: exp(d) - d - 1 with d = log pi_ref - log pi, never negative, 0 behind
    the mask. Unbiased on tokens that pi drew; elsewhere a penalty on moving either way.

    http://joschu.net/blog/kl-approx.html
    """
    if policy.ref_logps is None:
        raise MissingReferenceError("a KL term needs reference log-probabilities; pass reference= to the trainer")
    difference = (policy.ref_logps - policy.logps).masked_fill(~policy.mask, 0.0)
    return difference.expm1() - difference


def only(credit: TokenCredit, sign: int) -> TokenCredit:
    """`credit` with the tokens of one sign alone known: +1 or -1."""
    return replace(credit, known=credit.positive if sign > 0 else credit.negative)


def _weighted(weights: Tensor, policy: SequenceLogps, credit: TokenCredit) -> Float[Tensor, "B T"]:
    known = credit.known
    return -weights.detach().masked_fill(~known, 0.0) * policy.logps.masked_fill(~known, 0.0)


POLICY_LOSSES: dict[str, Callable[..., Tensor]] = {
    "reinforce": reinforce,
    "rwr": rwr,
    "awr": awr,
    "pmpo": pmpo,
    "psr": psr,
    "nsr": nsr,
    "w_reinforce": w_reinforce,
    "topr": topr,
    "asymre": asymre,
    "clipped": clipped,
    "step_kto": step_kto,
}

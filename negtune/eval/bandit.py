"""A bandit of 100 actions on which ways to learn from preferences differ, with exact expectations.

The reference is a heavy-tailed histogram with its mode at action 16. The reward peaks at an action that it almost never
takes (R1) or near its mode (R2), and no state matters. What each method makes of a batch of sampled actions is a loss
on the log-probabilities of all actions, of a network (`negtune.eval.bandit_training`) or of a table.

The task is the one of "Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data",
https://arxiv.org/abs/2404.14367, its didactic bandit and section 6. Numbers: recipes/LOG.md.

Shapes: S states, A = 100 actions, N samples per state, B pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf, pi
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from negtune.credit import advantages
from negtune.eval.step_theory import tilted
from negtune.losses.policy import clipped, reinforce, rwr
from negtune.losses.preference import chosen_nll, dpo, ipo
from negtune.ops import SequenceLogps, TokenCredit

ACTIONS = 100
LOCATION, SCALE = -0.7, 0.4

# --- The task ---------------------------------------------------------------------------------------------------------


def reference() -> Float[Tensor, " A"]:
    """pi_ref: chances that tanh of a Cauchy(-.7, .4) variable falls into each of 100 equal bins of [-1, 1]."""
    edges = torch.linspace(-1, 1, ACTIONS + 1, dtype=torch.float64).atanh()
    return (0.5 + ((edges - LOCATION) / SCALE).atan() / pi).diff()


def peaked_reward(peak: int, *, width: int = 10) -> Float[Tensor, " A"]:
    """exp(-((a - peak)/width)^2) of every action a."""
    return (-((torch.arange(ACTIONS, dtype=torch.float64) - peak) / width).square()).exp()


REWARDS = {
    f"{name}{f' width {width}' if width != 10 else ''}": peaked_reward(peak, width=width)
    for name, peak in (("R1", 70), ("R2", 20))
    for width in (10, 20, 30)
}
"""R1 peaks where the reference is thin, R2 near its mode; wider variants of both."""


# --- Samples and pairs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Actions drawn at some states.

    Args:
        actions, rewards: the draws.
        behaviour_logps: log-probability of each under the policy that drew it.
        ref_logps: log-probability of every action under the reference, the same at all states.
    """

    actions: Int[Tensor, "S N"]
    rewards: Float[Tensor, "S N"]
    behaviour_logps: Float[Tensor, "S N"]
    ref_logps: Float[Tensor, " A"]


@dataclass(frozen=True)
class Pairs:
    """A better and a worse action at a state, and how often this pair occurs."""

    state: Int[Tensor, " B"]
    chosen: Int[Tensor, " B"]
    rejected: Int[Tensor, " B"]
    count: Int[Tensor, " B"]

    def sides(self, logps: Float[Tensor, "S A"], ref_logps: Float[Tensor, " A"]) -> tuple[SequenceLogps, SequenceLogps]:
        """Chosen and rejected actions as answers of one token."""
        one = torch.ones(len(self.state), 1, dtype=torch.bool)
        chosen, rejected = (
            SequenceLogps(logps[self.state, action][:, None], one, ref_logps[action][:, None])
            for action in (self.chosen, self.rejected)
        )
        return chosen, rejected

    def mean(self, values: Float[Tensor, " B"]) -> Float[Tensor, ""]:
        """Mean over all occurrences; 0 if there is no pair."""
        return (self.count * values).sum() / self.count.sum().clamp(min=1)


def draw(
    logps: Float[Tensor, "S A"],
    reward: Float[Tensor, " A"],
    count: int,
    ref_logps: Float[Tensor, " A"],
    generator: torch.Generator,
) -> Samples:
    """`count` actions at every state."""
    actions = torch.multinomial(logps.exp(), count, replacement=True, generator=generator)
    return Samples(actions, reward[actions], logps.gather(-1, actions), ref_logps)


def all_pairs(samples: Samples, *, threshold: float = 0.0) -> Pairs:
    """All N (N - 1)/2 pairs of samples of one state whose rewards are at least `threshold` apart."""
    first, second = torch.combinations(torch.arange(samples.actions.shape[1])).unbind(-1)
    ahead = samples.rewards[:, first] >= samples.rewards[:, second]
    return _pairs(samples, torch.where(ahead, first, second), torch.where(ahead, second, first), threshold)


def best_against_worst(samples: Samples, *, threshold: float = 0.0) -> Pairs:
    """One pair per state whose best and worst sample are at least `threshold` apart."""
    best, worst = (choose(-1, keepdim=True) for choose in (samples.rewards.argmax, samples.rewards.argmin))
    return _pairs(samples, best, worst, threshold)


def _pairs(samples: Samples, better: Int[Tensor, "S P"], worse: Int[Tensor, "S P"], threshold: float) -> Pairs:
    gaps = samples.rewards.gather(-1, better) - samples.rewards.gather(-1, worse)
    states = torch.arange(len(gaps))[:, None].expand_as(gaps)
    columns = torch.stack([states, samples.actions.gather(-1, better), samples.actions.gather(-1, worse)], -1)
    found, counts = columns[gaps >= threshold].unique(dim=0, return_counts=True)
    return Pairs(*found.unbind(-1), counts)


# --- Methods: samples -> loss of all log-probabilities ----------------------------------------------------------------

Loss = Callable[[Tensor], Tensor]
"""`log-probabilities [S A] -> []`."""


def pairs_loss(
    samples: Samples,
    *,
    objective: Callable[..., Tensor],
    pairing: Callable[..., Pairs] = all_pairs,
    threshold: float = 0.0,
) -> Loss:
    """An objective of `negtune.losses.preference`, mean over the pairs. `threshold` is the filter on reward gaps."""
    pairs = pairing(samples, threshold=threshold)
    return lambda logps: pairs.mean(objective(*pairs.sides(logps, samples.ref_logps)))


def credit_loss(samples: Samples, *, objective: Callable[..., Tensor], **baseline: Any) -> Loss:
    """An objective of `negtune.losses.policy`, mean over samples; `baseline` goes to `negtune.credit.advantages`."""
    one = torch.ones_like(samples.actions, dtype=torch.bool)
    deserved = advantages(samples.rewards, one, **baseline)
    token = one.reshape(-1, 1)
    credit = TokenCredit(deserved.reshape(-1, 1), token, samples.behaviour_logps.reshape(-1, 1))

    def loss(logps: Tensor) -> Tensor:
        policy = SequenceLogps(logps.gather(-1, samples.actions).reshape(-1, 1), token)
        return objective(policy, credit).mean()

    return loss


def no_loss(samples: Samples) -> Loss:
    """Do nothing."""
    return lambda logps: 0 * logps.sum()


IPO_BETA = 0.05
"""The paper's margin of 10 is 1/(2 beta)."""
DPO_BETA = 0.1
THRESHOLDS = (0.001, 0.05, 0.2, 0.5)
"""Filters on reward gaps; the paper's code takes .2 here."""
TAUS = (0.03, 0.1, 0.3, 1.0, 10.0)


def _on_pairs(threshold: float) -> dict[str, Callable[[Samples], Loss]]:
    suffix = f", filter {threshold:g}" if threshold else ""
    return {
        f"Pref-FT{suffix}": partial(pairs_loss, objective=chosen_nll, threshold=threshold),
        f"Best-of-N{suffix}": partial(
            pairs_loss, objective=chosen_nll, pairing=best_against_worst, threshold=threshold
        ),
        f"IPO{suffix}": partial(pairs_loss, objective=partial(ipo, beta=IPO_BETA), threshold=threshold),
        f"DPO{suffix}": partial(pairs_loss, objective=partial(dpo, beta=DPO_BETA), threshold=threshold),
    }


METHODS: dict[str, Callable[[Samples], Loss]] = {
    "do nothing": no_loss,
    **{name: method for threshold in (0.0, *THRESHOLDS) for name, method in _on_pairs(threshold).items()},
    **{f"RWR tau {t:g}": partial(credit_loss, objective=partial(rwr, tau=t, cap=inf), baseline="none") for t in TAUS},
    "RWR tau 0.1, cap 10": partial(credit_loss, objective=partial(rwr, tau=0.1), baseline="none"),
    "REINFORCE": partial(credit_loss, objective=reinforce, baseline="leave_one_out"),
    "PPO": partial(credit_loss, objective=clipped, baseline="leave_one_out"),
}
"""Every method at the paper's settings, but for RWR's weights e^(r/tau), which its code cuts at 10.

With a filter only those pairs (for Best-of-N, states) count whose rewards are so far apart."""


# --- Mode seeking -----------------------------------------------------------------------------------------------------


def kl(logps: Float[Tensor, "*S A"], other: Float[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
    """KL(pi || other) from log-probabilities."""
    return F.kl_div(other, logps, log_target=True, reduction="none").sum(-1)


@dataclass(frozen=True)
class Descent:
    """Steps of a table of logits towards a target.

    Args:
        rewards: expected reward before each step.
        goal: expected reward of the target.
    """

    rewards: list[float]
    goal: float

    def steps_to(self, share: float) -> int | None:
        """Steps until the reward first reaches this share of the target's, or None."""
        return next((step for step, reward in enumerate(self.rewards) if reward >= share * self.goal), None)


def mode_seeking(
    reward: Float[Tensor, " A"], *, beta: float, reverse: bool, lr: float = 1.0, steps: int = 1500
) -> Descent:
    """Gradient descent from pi_ref on KL(target || pi), or the reverse, KL(pi || target), without sampling.

    The target is pi_ref e^(r/beta)/Z: weighted likelihood (RWR) minimises the first, reinforcement learning with a KL
    penalty the second. Ends early at 99 % of the target's reward.
    """
    target = tilted(reference(), reward, beta=beta)
    goal, log_target, logits, rewards = (target @ reward).item(), target.log(), reference().log(), []
    for _ in range(steps):
        logits = logits.detach().requires_grad_()
        logps = logits.log_softmax(-1)
        rewards.append((logps.detach().exp() @ reward).item())
        if rewards[-1] >= 0.99 * goal:
            break
        loss = kl(logps, log_target) if reverse else kl(log_target, logps)
        logits = logits - lr * torch.autograd.grad(loss, logits)[0]
    return Descent(rewards, goal)

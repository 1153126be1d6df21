"""Closed forms behind training on wrong steps, without a language model: https://arxiv.org/abs/2406.14532

Tilt: per-step DPO on pairs labelled by their advantages ends at pi_ref exp(A / beta) / Z (theorem 6.1).
Squeeze: pushing the top token of a softmax down spreads the mass, pushing an unlikely one down concentrates it.
Shortcut: on a task with a cue that agrees with the answer in training only, fine-tuning on one's own correct answers
leans on the cue more than the same steps of supervised fine-tuning do.

Shapes: B pairs, V tokens, N prompts, W = 2 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from negtune.losses.preference import dpo
from negtune.ops import SequenceLogps

# --- Tilt -------------------------------------------------------------------------------------------------------------


def population_step_dpo(
    logits: Float[Tensor, " V"], reference: Float[Tensor, " V"], advantages: Float[Tensor, " V"], *, beta: float
) -> Float[Tensor, ""]:
    """Expected `dpo` loss in one state: tokens i, j from `reference`, i preferred with chance sigma(A_i - A_j)."""
    first, second = torch.cartesian_prod(*[torch.arange(len(logits))] * 2).unbind(-1)
    logps, ref_logps = logits.log_softmax(-1), reference.log()

    def side(tokens: Int[Tensor, " B"]) -> SequenceLogps:
        mask = torch.ones(len(tokens), 1, dtype=torch.bool)
        return SequenceLogps(logps[tokens][:, None], mask, ref_logps[tokens][:, None])

    drawn = reference[first] * reference[second]
    preferred = (advantages[first] - advantages[second]).sigmoid()
    forward, backward = (dpo(side(a), side(b), beta=beta) for a, b in ((first, second), (second, first)))
    return (drawn * (preferred * forward + (1 - preferred) * backward)).sum()


def minimise_step_dpo(
    reference: Float[Tensor, " V"], advantages: Float[Tensor, " V"], *, beta: float, iterations: int = 25
) -> Float[Tensor, " V"]:
    """The policy at the minimum of `population_step_dpo`, by Newton's method from the reference."""

    def loss(logits: Tensor) -> Tensor:
        return population_step_dpo(logits, reference, advantages, beta=beta)

    logits = reference.log()
    for _ in range(iterations):
        gradient, curvature = torch.func.grad(loss)(logits), torch.func.hessian(loss)(logits)
        # logits have one direction too many; the pseudo-inverse stays out of it
        logits = logits - torch.linalg.pinv(curvature, hermitian=True) @ gradient
    return logits.softmax(-1)


def tilted(reference: Float[Tensor, " V"], advantages: Float[Tensor, " V"], *, beta: float) -> Float[Tensor, " V"]:
    """pi_ref exp(A / beta) / Z, the policy that advantage-weighted regression aims at."""
    return (reference.log() + advantages / beta).softmax(-1)


# --- Squeeze ----------------------------------------------------------------------------------------------------------


def entropy_change(
    logits: Float[Tensor, " V"], token: int, objective: Callable[[SequenceLogps], Tensor], *, lr: float
) -> float:
    """By how much one step of gradient descent on `objective` of a one-token answer changes the entropy, in nats."""
    logits = logits.detach().requires_grad_()
    answer = SequenceLogps(logits.log_softmax(-1)[None, token : token + 1], torch.ones(1, 1, dtype=torch.bool))
    moved = logits - lr * torch.autograd.grad(objective(answer).sum(), logits)[0]
    before, after = (torch.distributions.Categorical(logits=each.detach()).entropy() for each in (logits, moved))
    return (after - before).item()


# --- Shortcut ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fork:
    """`forks` choices among `options`, of which one is right and one is marked; an answer is right if every choice is.

    The policy is log-linear, logit = w_right [is right] + w_mark [is marked], so two weights are all it has. In
    training the mark stands on the right option at every fork of a prompt with chance `agreement`, otherwise on a
    wrong one at every fork. At test it stands on a random option of every fork.
    """

    forks: int = 5
    options: int = 3
    agreement: float = 0.9
    weight_decay: float = 0.02

    def logps_of_right(self, weights: Float[Tensor, " W"], agrees: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Log-probability of the right option at one fork, with the mark on it or on another."""
        right, mark = weights
        nothing = torch.zeros(self.options - 2, dtype=weights.dtype)
        marked = torch.cat([(right + mark)[None], torch.zeros_like(mark)[None], nothing]).log_softmax(-1)[0]
        misled = torch.cat([right[None], mark[None], nothing]).log_softmax(-1)[0]
        return torch.where(agrees, marked, misled)

    def test_success(self, weights: Float[Tensor, " W"]) -> float:
        """Chance of a right answer at test, exactly."""
        agree, differ = self.logps_of_right(weights, torch.tensor([True, False])).exp().tolist()
        return ((agree + (self.options - 1) * differ) / self.options) ** self.forks

    def fit(self, weights: Float[Tensor, " W"], share: float, *, steps: int, lr: float = 2.0) -> Float[Tensor, " W"]:
        """Gradient descent on the mean over forks of -log p(right), plus weight_decay/2 |w|^2.

        `share` is that of the answers in the data on which the mark agrees.
        """
        shares, agrees = torch.tensor([share, 1 - share], dtype=torch.float64), torch.tensor([True, False])
        for _ in range(steps):
            weights = weights.detach().requires_grad_()
            loss = -(shares * self.logps_of_right(weights, agrees)).sum()
            loss = loss + self.weight_decay / 2 * weights.square().sum()
            weights = weights - lr * torch.autograd.grad(loss, weights)[0]
        return weights.detach()


@dataclass(frozen=True)
class ShortcutResult:
    """Test success of each way to train, and its two weights."""

    success: dict[str, float]
    weights: dict[str, list[float]]


def shortcut_experiment(
    task: Fork, seed: int, *, prompts: int = 2000, samples: int = 4, sft_steps: int = 600, steps: int = 400
) -> ShortcutResult:
    """SFT on the right answers of `prompts`, then `steps` more of it, or of the same on the model's own right answers.

    RFT: `samples` answers per prompt, every right one is kept. RFT, distinct: once for each prompt that was solved.
    The right answer to a prompt is unique, so RFT sees the answers of SFT, only in other proportions: prompts on
    which the mark misleads are solved less often.
    """
    generator = torch.Generator().manual_seed(seed)
    agrees = torch.rand(prompts, generator=generator) < task.agreement
    share = agrees.double().mean().item()
    sft = task.fit(torch.zeros(2, dtype=torch.float64), share, steps=sft_steps)
    chance = (task.forks * task.logps_of_right(sft, agrees)).exp()
    right = torch.rand(samples, prompts, generator=generator) < chance
    kept, solved = agrees.expand(samples, -1)[right], agrees[right.any(0)]
    weights = {
        "SFT": sft,
        "continued SFT": task.fit(sft, share, steps=steps),
        "RFT": task.fit(sft, kept.double().mean().item(), steps=steps),
        "RFT, distinct": task.fit(sft, solved.double().mean().item(), steps=steps),
    }
    return ShortcutResult(
        {name: task.test_success(value) for name, value in weights.items()},
        {name: value.tolist() for name, value in weights.items()},
    )

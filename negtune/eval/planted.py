"""A planted sub-sequence: step-level credit on a task so small that every value is exact, in float64.

Ten tokens are drawn; the reward is 1 if a hidden sequence of five stands somewhere among them. How much of it the last
tokens match is all that matters, so policies are tables over (time, matched) and dynamic programming gives Q, V, A and
the chance of success. Online: which effective reward learns faster, at which learning rate. Offline: positives only,
per-step pairs and whole-trajectory pairs from the same responses.

The task is the one of "Rewarding Progress", https://arxiv.org/abs/2410.08146, section 3.3; the offline half follows
"RL on Incorrect Synthetic Data", https://arxiv.org/abs/2406.14532. Numbers: recipes/LOG.md.

Shapes: B sequences, T tokens of a sequence, M matched-prefix states (the last one is success), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from negtune import credit
from negtune.credit import Tally, first_pit
from negtune.losses.policy import positive_nll, reinforce
from negtune.losses.preference import dpo
from negtune.ops import SequenceLogps, TokenCredit

# --- The task ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Automaton:
    """Knuth-Morris-Pratt automaton of the hidden sequence: `step[m, token]` is the matched length afterwards."""

    hidden: tuple[int, ...]
    step: Int[Tensor, "M V"]
    length: int


@dataclass(frozen=True)
class Values:
    """What a policy is worth at every time and state: `q` before a token is drawn, `v` before choosing one."""

    q: Float[Tensor, "T M V"]
    v: Float[Tensor, "T+1 M"]

    @property
    def advantage(self) -> Float[Tensor, "T M V"]:
        """A = Q - V."""
        return self.q - self.v[:-1, :, None]

    @property
    def success(self) -> float:
        """Chance that a sequence contains the hidden one."""
        return self.v[0, 0].item()


@dataclass(frozen=True)
class Paths:
    """Sampled sequences: the state before each token, the tokens, and whether the hidden sequence appeared."""

    states: Int[Tensor, "B T"]
    tokens: Int[Tensor, "B T"]
    success: Bool[Tensor, " B"]

    def of(self, table: Float[Tensor, "T M V"]) -> Float[Tensor, "B T"]:
        """The entry of each (time, state, token) on the paths."""
        times = torch.arange(self.states.shape[1])
        return table[times, self.states, self.tokens]

    def scored_by(self, logps: Float[Tensor, "T M V"], ref: Float[Tensor, "T M V"] | None = None) -> SequenceLogps:
        """The paths as objectives read them."""
        mask = torch.ones(self.tokens.shape, dtype=torch.bool)
        return SequenceLogps(self.of(logps), mask, None if ref is None else self.of(ref))

    def where(self, rows: Tensor) -> Paths:
        return Paths(self.states[rows], self.tokens[rows], self.success[rows])


def automaton(hidden: tuple[int, ...], *, vocabulary: int = 15, length: int = 10) -> Automaton:
    """The longest prefix of `hidden` that ends at the new token, for every state and token; success is never left."""
    size = len(hidden)
    step = torch.full((size + 1, vocabulary), size)
    for matched in range(size):
        for token in range(vocabulary):
            seen = (*hidden[:matched], token)
            step[matched, token] = max(k for k in range(matched + 2) if seen[len(seen) - k :] == hidden[:k])
    return Automaton(hidden, step, length)


def random_automaton(seed: int, *, vocabulary: int = 15, length: int = 10, hidden: int = 5) -> Automaton:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(vocabulary, (hidden,), generator=generator)
    return automaton(tuple(drawn.tolist()), vocabulary=vocabulary, length=length)


def prover(task: Automaton, gamma: float) -> Float[Tensor, "T M V"]:
    """mu_gamma: the next hidden token has weight `gamma`, every other token weight 1."""
    weights = torch.ones(task.step.shape, dtype=torch.float64)
    weights[torch.arange(len(task.hidden)), torch.tensor(task.hidden)] = gamma
    return (weights / weights.sum(-1, keepdim=True)).expand(task.length, -1, -1)


def values(task: Automaton, policy: Float[Tensor, "T M V"]) -> Values:
    """Backward induction from V = 1 at success and 0 elsewhere."""
    v = torch.zeros(task.length + 1, task.step.shape[0], dtype=torch.float64)
    v[-1, -1] = 1
    q = torch.empty(policy.shape, dtype=torch.float64)
    for time in reversed(range(task.length)):
        q[time] = v[time + 1][task.step]
        v[time] = (policy[time] * q[time]).sum(-1)
    return Values(q, v)


def sample(
    task: Automaton, policy: Float[Tensor, "T M V"], start: Int[Tensor, " B"], generator: torch.Generator, time: int = 0
) -> Paths:
    """Continue from the states `start` at `time` to the end (`T` of the result is what was left)."""
    states, tokens, current = [], [], start
    for table in policy[time:]:
        drawn = torch.multinomial(table[current], 1, generator=generator)[:, 0]
        states.append(current)
        tokens.append(drawn)
        current = task.step[current, drawn]
    return Paths(torch.stack(states, 1), torch.stack(tokens, 1), current == len(task.hidden))


# --- Online: effective rewards ----------------------------------------------------------------------------------------

Reward = Callable[[Paths, Values, Values], Tensor]
"""`(paths, values of the policy, values of the prover) -> [B T]`: what multiplies each token's log-probability."""


def _outcome(paths: Paths, policy: Values, other: Values) -> Tensor:
    return paths.success.double()[:, None].expand(paths.tokens.shape)


def _outcome_minus_mean(paths: Paths, policy: Values, other: Values) -> Tensor:
    rewards = paths.success.double()[None]
    return credit.advantages(rewards, torch.ones_like(paths.success)[None], baseline="batch").mT.expand(
        paths.tokens.shape
    )


REWARDS: dict[str, Reward] = {
    "outcome": _outcome,
    "outcome - mean": _outcome_minus_mean,
    "Q": lambda paths, policy, other: paths.of(policy.q),
    "A": lambda paths, policy, other: paths.of(policy.advantage),
    "Q + A of the prover": lambda paths, policy, other: paths.of(policy.q + other.advantage),
}


def reinforce_successes(
    task: Automaton,
    reward: Reward,
    *,
    lr: float,
    seed: int,
    start_gamma: float = 5.0,
    prover_gamma: float = 10.0,
    batch: int = 64,
    iterations: int = 350,
    stop_at: float = 0.9,
) -> list[float]:
    """Success (exact) before each iteration of policy-gradient ascent on a table over the matched length alone.

    One iteration: `batch` fresh sequences, one step of plain gradient descent on
    -mean over sequences of sum over tokens of reward x log pi. Ends early once success reaches `stop_at`.
    """
    generator = torch.Generator().manual_seed(seed)
    other = values(task, prover(task, prover_gamma))
    logits = prover(task, start_gamma)[0].log()
    successes = []
    for _ in range(iterations + 1):
        logits = logits.detach().requires_grad_()
        logps = logits.log_softmax(-1).expand(task.length, -1, -1)
        current = values(task, logps.detach().exp())
        successes.append(current.success)
        if successes[-1] >= stop_at:
            break
        paths = sample(task, logps.detach().exp(), torch.zeros(batch, dtype=torch.int64), generator)
        loss = reinforce(paths.scored_by(logps), _credit(reward(paths, current, other))).sum(-1).mean()
        logits = logits - lr * torch.autograd.grad(loss, logits)[0]
    return successes


def _credit(advantages: Float[Tensor, "B T"]) -> TokenCredit:
    return TokenCredit(advantages, torch.ones(advantages.shape, dtype=torch.bool))


def iterations_to(successes: list[float], level: float) -> int | None:
    """Iterations until success first reaches `level`, or None."""
    return next((step for step, success in enumerate(successes) if success >= level), None)


def expected_gradient_norm(task: Automaton, reward: str, *, gamma: float = 5.0, prover_gamma: float = 10.0) -> float:
    """Norm of the policy gradient at the start without sampling noise, for the rewards that are tables ("Q", ...).

    Outcome, its baselined form and A have the expectation of "Q" (baselines cancel).
    """
    policy = prover(task, gamma)
    current, other = values(task, policy), values(task, prover(task, prover_gamma))
    table = {"Q": current.q, "Q + A of the prover": current.q + other.advantage}[reward]
    visits = torch.zeros(task.step.shape[0], dtype=torch.float64)
    visits[0] = 1
    gradient = torch.zeros(task.step.shape, dtype=torch.float64)
    for time in range(task.length):
        chosen = visits[:, None] * policy[time]
        gradient += chosen * (table[time] - (policy[time] * table[time]).sum(-1, keepdim=True))
        visits = torch.zeros_like(visits).index_add(0, task.step.flatten(), chosen.flatten())
    return gradient.norm().item()


# --- Offline: positives, per-step pairs, whole-trajectory pairs -------------------------------------------------------


@dataclass(frozen=True)
class StepPairs:
    """Pairs that differ in one token: at `time` and `state`, `chosen` led on to success and `rejected` is the pit."""

    time: Int[Tensor, " B"]
    state: Int[Tensor, " B"]
    chosen: Int[Tensor, " B"]
    rejected: Int[Tensor, " B"]
    rollouts: int  # drawn to find the pairs


def first_pit_pairs(
    task: Automaton,
    policy: Float[Tensor, "T M V"],
    responses: Paths,
    generator: torch.Generator,
    *,
    rollouts: int = 8,
) -> StepPairs:
    """For each wrong response the first step of lowest value, and a token of a rollout that succeeded instead of it.

    The value behind a step is the share of `rollouts` of `policy` from there that succeed (the paper's best-of-5 of it
    has the same minimum). A response whose pit has no successful rollout from the prefix before it gives no pair.
    """
    wrong = responses.where(~responses.success)
    count, length = wrong.tokens.shape
    won = torch.empty(count, length, rollouts, dtype=torch.bool)
    first = torch.empty(count, length, rollouts, dtype=torch.int64)
    for time in range(length):
        paths = sample(task, policy, wrong.states[:, time].repeat_interleave(rollouts), generator, time)
        won[:, time], first[:, time] = paths.success.view(count, -1), paths.tokens[:, 0].view(count, -1)
    pairs = []
    for row, correct in enumerate(won.sum(-1).tolist()):
        pit = first_pit([Tally(right, rollouts - right) for right in correct], False, "argmin").step
        if pit is None or not correct[pit - 1]:
            continue
        time = pit - 1
        instead = first[row, time, won[row, time].long().argmax()]
        pairs.append((time, wrong.states[row, time].item(), instead.item(), wrong.tokens[row, time].item()))
    columns = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 4).unbind(-1)
    return StepPairs(*columns, rollouts=won.numel())


def counted(task: Automaton, policy: Float[Tensor, "T M V"], positives: Paths) -> Float[Tensor, "T M V"]:
    """The limit of maximum likelihood on `positives`: shares of the tokens seen; `policy` where no path has been.

    Every continuation seen led to success from where it led, so mixing them never fails: success is exactly 1.
    """
    counts = torch.zeros(policy.shape, dtype=torch.float64)
    times = torch.arange(task.length).expand(positives.tokens.shape)
    ones = torch.ones(positives.tokens.shape, dtype=torch.float64)
    counts.index_put_((times, positives.states, positives.tokens), ones, accumulate=True)
    seen = counts.sum(-1, keepdim=True)
    return torch.where(seen > 0, counts / seen.clamp(min=1), policy)


def descend(
    logits: Float[Tensor, "T M V"], loss: Callable[[Tensor], Tensor], *, lr: float, steps: int
) -> Float[Tensor, "T M V"]:
    """Plain full-batch gradient descent on `loss(log-probabilities [T M V])`; the policy it ends with."""
    for _ in range(steps):
        logits = logits.detach().requires_grad_()
        logits = logits - lr * torch.autograd.grad(loss(logits.log_softmax(-1)), logits)[0]
    return logits.detach().softmax(-1)


def positives_loss(positives: Paths) -> Callable[[Tensor], Tensor]:
    """Rejection fine-tuning: -log pi of the successful responses, mean over responses."""
    ones = _credit(torch.ones(positives.tokens.shape, dtype=torch.float64))
    return lambda logps: positive_nll(positives.scored_by(logps), ones).sum(-1).mean()


def step_pairs_loss(pairs: StepPairs, policy: Float[Tensor, "T M V"], *, beta: float = 0.1) -> Callable:
    """`dpo` on single tokens; the reference is `policy`."""
    one = torch.ones(len(pairs.time), 1, dtype=torch.bool)
    ref = policy.log()

    def side(logps: Tensor, tokens: Tensor) -> SequenceLogps:
        at = (pairs.time, pairs.state, tokens)
        return SequenceLogps(logps[at][:, None], one, ref[at][:, None])

    return lambda logps: dpo(side(logps, pairs.chosen), side(logps, pairs.rejected), beta=beta).mean()


def trajectory_pairs_loss(
    responses: Paths, policy: Float[Tensor, "T M V"], generator: torch.Generator, *, beta: float = 0.1
) -> Callable:
    """`dpo` on whole responses: each wrong one against a right one drawn at random."""
    right, rejected = responses.where(responses.success), responses.where(~responses.success)
    chosen = right.where(torch.randint(len(right.success), (len(rejected.success),), generator=generator))
    ref = policy.log()
    return lambda logps: dpo(chosen.scored_by(logps, ref), rejected.scored_by(logps, ref), beta=beta).mean()


def offline_successes(seed: int, *, responses: int, lrs: Sequence[float], steps: int = 300) -> dict[str, float]:
    """Success after each offline method at each learning rate, from `responses` of mu_40, all with the same steps.

    "RFT, equal samples" draws as many more responses as the rollouts that the step pairs cost would have been.
    """
    task, generator = random_automaton(seed), torch.Generator().manual_seed(seed)
    policy = prover(task, 40.0)
    drawn = sample(task, policy, torch.zeros(responses, dtype=torch.int64), generator)
    pairs = first_pit_pairs(task, policy, drawn, generator)
    right = drawn.where(drawn.success)
    more = sample(task, policy, torch.zeros(responses + pairs.rollouts, dtype=torch.int64), generator)
    losses = {
        "RFT": positives_loss(right),
        "RFT, equal samples": positives_loss(more.where(more.success)),
        "per-step DPO": step_pairs_loss(pairs, policy),
        "trajectory DPO": trajectory_pairs_loss(drawn, policy, generator),
    }
    found = {"start": values(task, policy).success, "RFT, limit": values(task, counted(task, policy, right)).success}
    for name, loss in losses.items():
        for lr in lrs:
            found[f"{name} @ {lr:g}"] = values(task, descend(policy.log(), loss, lr=lr, steps=steps)).success
    return found

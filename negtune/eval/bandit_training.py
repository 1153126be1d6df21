"""Train a small network on the bandit of `negtune.eval.bandit`, offline or on-policy, and measure it exactly.

Shapes: S states to train on, E held-out states to evaluate on, W = 100 numbers of a state, A = 100 actions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from negtune.eval.bandit import ACTIONS, METHODS, REWARDS, Samples, all_pairs, draw, kl, reference

STATE_WIDTH = 100
HELD_OUT = 500
"""States on which a policy is measured."""
LOG_EVERY = 15
"""Gradient steps between two rewards of a curve."""
DISPLACED = -20.0
"""log pi/pi_ref of the best samples below which they count as displaced."""


@dataclass(frozen=True)
class Setting:
    """How to train.

    Args:
        reward, method: names in `REWARDS` and `METHODS`.
        lr: of Adam.
        states: to train on.
        samples: drawn at each of them in every round.
        rounds: data collections; the first draws from the reference, later ones from the policy. 1 is offline.
        steps: gradient steps on all data of a round.
    """

    reward: str
    method: str
    lr: float
    states: int = 100
    samples: int = 10
    rounds: int = 1
    steps: int = 200


@dataclass(frozen=True)
class Outcome:
    """What a run ended with. What is said of samples is a mean over the last round's, all else over held-out states.

    Args:
        reward: expected reward.
        best: log pi/pi_ref of the best sample of each state.
        others: the same of the other samples.
        chosen, rejected: the same of either side of all pairs of samples of a state.
        peak: log pi/pi_ref of the action with the largest reward.
        kl: KL(pi || pi_ref).
        entropy: in nats.
        rewards: expected reward every `LOG_EVERY` gradient steps, and at the end.
    """

    reward: float
    best: float
    others: float
    chosen: float
    rejected: float
    peak: float
    kl: float
    entropy: float
    rewards: list[float]

    @property
    def margin(self) -> float:
        """Of the implicit rewards, before beta."""
        return self.chosen - self.rejected

    @property
    def displaced(self) -> bool:
        """Whether pairs are told apart while the best sample itself has become much less likely."""
        return self.margin > 0 and self.best < DISPLACED


def train(setting: Setting, seed: int) -> Outcome:
    """Warm start on the reference, then `rounds` of drawing and `steps` full-batch steps; alike but for the method."""
    generator = torch.Generator().manual_seed(seed)
    policy = warm_start(generator)
    states, held_out = _states(setting.states, generator), _states(HELD_OUT, generator)
    reward, ref_logps = REWARDS[setting.reward].float(), reference().log().float()
    optimiser = torch.optim.Adam(policy.parameters(), lr=setting.lr)
    rewards = []
    for step in range(setting.rounds * setting.steps):
        if step % LOG_EVERY == 0:
            rewards.append(_expected(reward, logps_of(policy, held_out)))
        if step % setting.steps == 0:
            behaviour = logps_of(policy, states) if step else ref_logps.expand(len(states), -1)
            samples = draw(behaviour, reward, setting.samples, ref_logps, generator)
            loss = METHODS[setting.method](samples)
        optimiser.zero_grad()
        loss(policy(states)).backward()
        optimiser.step()
    final = logps_of(policy, held_out)
    return _measure(samples, reward, logps_of(policy, states), final, [*rewards, _expected(reward, final)])


def network(generator: torch.Generator) -> nn.Sequential:
    """State to log-probabilities of the actions; nearly uniform at first."""
    policy = nn.Sequential(
        *(nn.Linear(STATE_WIDTH, 50), nn.LayerNorm(50), nn.ReLU(), nn.Linear(50, 256), nn.ReLU()),
        *(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, ACTIONS), nn.LogSoftmax(-1)),
    )
    for layer in policy:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, gain=0.01, generator=generator)
            nn.init.zeros_(layer.bias)
    return policy


def warm_start(generator: torch.Generator, *, steps: int = 100, lr: float = 0.01, states: int = 100) -> nn.Sequential:
    """A network that has learnt the reference: Adam on KL(pi || pi_ref) at fresh states."""
    policy, ref_logps = network(generator), reference().log().float()
    optimiser = torch.optim.Adam(policy.parameters(), lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        kl(policy(_states(states, generator)), ref_logps.expand(states, -1)).mean().backward()
        optimiser.step()
    return policy


@torch.no_grad()
def logps_of(policy: nn.Module, states: Float[Tensor, "S W"]) -> Float[Tensor, "S A"]:
    return policy(states)


def _states(count: int, generator: torch.Generator) -> Float[Tensor, "S W"]:
    return torch.rand(count, STATE_WIDTH, generator=generator)


def _expected(reward: Float[Tensor, " A"], logps: Float[Tensor, "S A"]) -> float:
    return (logps.exp() @ reward).mean().item()


def _measure(
    samples: Samples,
    reward: Float[Tensor, " A"],
    trained: Float[Tensor, "S A"],
    held_out: Float[Tensor, "E A"],
    rewards: list[float],
) -> Outcome:
    ratios = (trained - samples.ref_logps).gather(-1, samples.actions)
    best = F.one_hot(samples.rewards.argmax(-1), ratios.shape[1]).bool()
    pairs = all_pairs(samples)
    chosen, rejected = (pairs.mean(side.log_ratio).item() for side in pairs.sides(trained, samples.ref_logps))
    return Outcome(
        reward=rewards[-1],
        best=ratios[best].mean().item(),
        others=ratios[~best].mean().item(),
        chosen=chosen,
        rejected=rejected,
        peak=(held_out - samples.ref_logps)[:, reward.argmax()].mean().item(),
        kl=kl(held_out, samples.ref_logps.expand_as(held_out)).mean().item(),
        entropy=torch.special.entr(held_out.exp()).sum(-1).mean().item(),
        rewards=rewards,
    )

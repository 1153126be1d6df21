"""Paths in star graphs: can training on wrong first steps repair the shortcut of next-token prediction?

Several arms of equal length leave a start node; the answer is the path to the leaf that is the goal. Trained on right
answers, a model soon learns to follow edges, which gives every token but the first; the first is a guess between the
arms. That is the shortcut. "RL on Incorrect Synthetic Data", https://arxiv.org/abs/2406.14532, trains on it from an
under-trained and from an over-trained model; the task is from https://arxiv.org/abs/2403.06963.

Here a small transformer is trained from scratch; each edge is one position (the embeddings of its ends, summed), then
start, goal and the path. A wrong step is never repaired, so the first wrong token of an answer is its first pit, and
what stands before it is the right path: one forward pass over right paths serves every objective.

Shapes: B graphs, E edges, L tokens of a path, V nodes (the vocabulary).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from negtune.losses.policy import nsr, positive_nll
from negtune.losses.preference import dpo
from negtune.ops import SequenceLogps, TokenCredit

# --- The task ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stars:
    """`B` star graphs: shuffled edges, where to start, where to go, and the only path there (without the start)."""

    edges: Int[Tensor, "B E 2"]
    start: Int[Tensor, " B"]
    goal: Int[Tensor, " B"]
    path: Int[Tensor, "B L"]

    def __len__(self) -> int:
        return len(self.goal)

    def where(self, rows: Tensor) -> Stars:
        return Stars(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw_stars(count: int, generator: torch.Generator, *, arms: int = 2, length: int = 3, nodes: int = 12) -> Stars:
    """`arms` arms of `length` nodes each around a start; names are drawn from `nodes` without replacement."""
    if nodes < arms * length + 1:
        raise ValueError(f"{arms} arms of {length} nodes and a start need {arms * length + 1} names, got nodes={nodes}")
    names = torch.rand(count, nodes, generator=generator).argsort(-1)
    start, tips = names[:, :1], names[:, 1 : arms * length + 1].view(count, arms, length)
    sources = torch.cat([start[:, None].expand(-1, arms, -1), tips[:, :, :-1]], -1)
    edges = torch.stack([sources, tips], -1).view(count, arms * length, 2)
    order = torch.rand(count, arms * length, generator=generator).argsort(-1)
    edges = edges.gather(1, order[..., None].expand(-1, -1, 2))
    return Stars(edges, start[:, 0], tips[:, 0, -1], tips[:, 0])  # names and edges are shuffled: arm 0 is any arm


def first_wrong(answers: Int[Tensor, "B L"], path: Int[Tensor, "B L"]) -> Int[Tensor, " B"]:
    """Index of the first token that leaves the path; L for a right answer."""
    return (answers == path).long().cumprod(-1).sum(-1)


# --- The model --------------------------------------------------------------------------------------------------------


class PathModel(nn.Module):
    """A causal transformer over edges, start, goal and path."""

    def __init__(self, nodes: int = 12, length: int = 3, *, width: int = 64, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(nodes, width), nn.Embedding(nodes, width)
        self.place = nn.Embedding(length + 1, width)  # start, goal, and the tokens of the path but the last
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, nodes, bias=False)
        for table in (self.source, self.target, self.place):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, stars: Stars, answers: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """Log-probabilities of every token of `answers`, given those before it; its last token is not read."""
        edges = self.source(stars.edges[..., 0]) + self.target(stars.edges[..., 1])
        tokens = torch.cat([stars.start[:, None], stars.goal[:, None], answers[:, :-1]], 1)
        hidden = torch.cat([edges, self.target(tokens) + self.place.weight[: tokens.shape[1]]], 1)
        mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1])
        hidden = self.body(hidden, mask=mask, is_causal=True)
        return self.head(hidden[:, edges.shape[1] + 1 :]).log_softmax(-1)


@torch.no_grad()
def sample_paths(model: PathModel, stars: Stars, generator: torch.Generator) -> Int[Tensor, "B L"]:
    """One answer per graph at temperature 1."""
    answers = torch.zeros_like(stars.path)
    for index in range(answers.shape[1]):
        chances = model(stars, answers)[:, index].exp()
        answers[:, index] = torch.multinomial(chances, 1, generator=generator)[:, 0]
    return answers


@dataclass(frozen=True)
class Score:
    """Greedy accuracy of the first token, of the others given the right ones before, and of whole paths; mean chance
    of the right first token."""

    first: float
    others: float
    success: float
    first_chance: float


@torch.no_grad()
def score(model: PathModel, stars: Stars) -> Score:
    logps = model(stars, stars.path)
    right = (logps.argmax(-1) == stars.path).double()
    first_chance = logps[:, 0].gather(-1, stars.path[:, :1]).exp().mean().item()
    return Score(right[:, 0].mean().item(), right[:, 1:].mean().item(), right.prod(-1).mean().item(), first_chance)


# --- Ways to go on ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Graphs, one answer to each drawn before training, and what the model said then, along the right paths."""

    stars: Stars
    answers: Int[Tensor, "B L"]
    ref_logps: Float[Tensor, "B L V"]

    @property
    def pit(self) -> Int[Tensor, " B"]:
        return first_wrong(self.answers, self.stars.path)

    def where(self, rows: Tensor) -> Batch:
        return Batch(self.stars.where(rows), self.answers[rows], self.ref_logps[rows])

    def at_pit(self, logps: Float[Tensor, "B L V"], tokens: Int[Tensor, "B L"]) -> SequenceLogps:
        """The one token of `tokens` at the first pit of each answer."""
        rows, pit = torch.arange(len(self.answers)), self.pit
        chosen = tokens[rows, pit]
        mask = torch.ones(len(rows), 1, dtype=torch.bool)
        return SequenceLogps(logps[rows, pit, chosen][:, None], mask, self.ref_logps[rows, pit, chosen][:, None])


def _credit(shape: torch.Size, advantage: float) -> TokenCredit:
    return TokenCredit(torch.full(shape, advantage), torch.ones(shape, dtype=torch.bool))


def right_path_loss(logps: Float[Tensor, "B L V"], batch: Batch) -> Float[Tensor, " B"]:
    """-log p of the right path."""
    path = batch.stars.path
    policy = SequenceLogps(logps.gather(-1, path[..., None])[..., 0], torch.ones(path.shape, dtype=torch.bool))
    return positive_nll(policy, _credit(path.shape, 1.0)).sum(-1)


def step_dpo_loss(logps: Float[Tensor, "B L V"], batch: Batch, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """`dpo` between the right token and the drawn one at the first pit."""
    chosen, rejected = batch.at_pit(logps, batch.stars.path), batch.at_pit(logps, batch.answers)
    return dpo(chosen, rejected, beta=beta)


def push_down_loss(logps: Float[Tensor, "B L V"], batch: Batch) -> Float[Tensor, " B"]:
    """`nsr` on the drawn token at the first pit: negatives only."""
    policy = batch.at_pit(logps, batch.answers)
    return nsr(policy, _credit(policy.logps.shape, -1.0)).sum(-1)


@dataclass(frozen=True)
class Arm:
    """A loss, which of the drawn answers it is taken on (`all`, the `right` or the `wrong` ones), and in how many
    rounds they are drawn: 1 is offline, more draw the next part of the answers from the model as it is by then."""

    loss: Callable[[Tensor, Batch], Tensor]
    uses: str
    rounds: int = 1

    def rows(self, batch: Batch) -> Int[Tensor, " B"]:
        right = batch.pit == batch.answers.shape[1]
        kept: dict[str, Bool[Tensor, " B"]] = {"all": torch.ones_like(right), "right": right, "wrong": ~right}
        return kept[self.uses].nonzero()[:, 0]


ARMS: dict[str, Arm] = {
    "continued SFT": Arm(right_path_loss, "all"),
    "RFT": Arm(right_path_loss, "right"),
    "per-step DPO": Arm(partial(step_dpo_loss, beta=0.1), "wrong"),
    "per-step DPO, on-policy": Arm(partial(step_dpo_loss, beta=0.1), "wrong", rounds=10),
    "push-down": Arm(push_down_loss, "wrong"),
    "push-down, on-policy": Arm(push_down_loss, "wrong", rounds=10),
}


@torch.no_grad()
def draw_batch(model: PathModel, stars: Stars, generator: torch.Generator, *, chunk: int = 500) -> Batch:
    parts = [stars.where(rows) for rows in torch.arange(len(stars)).split(chunk)]
    answers = torch.cat([sample_paths(model, part, generator) for part in parts])
    return Batch(stars, answers, torch.cat([model(part, part.path) for part in parts]))


def train(
    model: PathModel, data: Batch, arm: Arm, generator: torch.Generator, *, lr: float, steps: int, rows: int = 64
) -> PathModel:
    """A copy of `model` after `steps` Adam steps on `rows` rows each, drawn from those that the arm uses.

    `data` holds one answer of `model` per graph; an arm of several rounds replaces the later ones by answers of the
    model as it is by then. Ends early if there is nothing to train on any more (no wrong answer in a round, say).
    """
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for number, part in enumerate(torch.arange(len(data.answers)).tensor_split(arm.rounds)):
        drawn = data.where(part)
        if number:
            drawn = replace(drawn, answers=sample_paths(model, drawn.stars, generator))
        usable = arm.rows(drawn)
        if not len(usable):
            break
        for _ in range(steps // arm.rounds):
            batch = drawn.where(usable[torch.randint(len(usable), (rows,), generator=generator)])
            loss = arm.loss(model(batch.stars, batch.stars.path), batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


# --- The experiment ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Graphs and Adam steps. Under-trained: the model follows edges and guesses the arm; over-trained: it knows the
    arm on the graphs of SFT and still guesses on others. Every arm goes on from both, on graphs that SFT never saw."""

    sft_graphs: int = 4000
    pool_graphs: int = 10_000
    test_graphs: int = 2000
    under_steps: int = 200
    over_steps: int = 1500
    steps: int = 500
    rows: int = 64


@dataclass(frozen=True)
class Seed:
    """Graphs and starting models of one seed."""

    test: Stars
    starts: dict[str, PathModel]
    drawn: dict[str, Batch]  # answers of the starting models on graphs that SFT never saw
    seen: dict[str, Score]  # on the graphs of SFT
    before: dict[str, Score]  # on the test graphs

    def after(self, start: str, arm: Arm, sizes: Sizes, *, lr: float) -> Score:
        """On the test graphs, after going on from `start`."""
        generator = torch.Generator().manual_seed(0)
        model, data = self.starts[start], self.drawn[start]
        return score(train(model, data, arm, generator, lr=lr, steps=sizes.steps, rows=sizes.rows), self.test)


def prepare(seed: int, sizes: Sizes) -> Seed:
    """Draw graphs and train both starting models; the over-trained one goes on from the under-trained."""
    generator = torch.Generator().manual_seed(seed)
    sft, pool, test = (
        draw_stars(count, generator) for count in (sizes.sft_graphs, sizes.pool_graphs, sizes.test_graphs)
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = PathModel()
    under = _sft(fresh, sft, generator, sizes.under_steps, sizes.rows)
    starts = {
        "under-trained": under,
        "over-trained": _sft(under, sft, generator, sizes.over_steps - sizes.under_steps, sizes.rows),
    }
    drawn = {name: draw_batch(model, pool, generator) for name, model in starts.items()}
    on_sft, on_test = ({name: score(model, graphs) for name, model in starts.items()} for graphs in (sft, test))
    return Seed(test, starts, drawn, seen=on_sft, before=on_test)


def _sft(model: PathModel, stars: Stars, generator: torch.Generator, steps: int, rows: int) -> PathModel:
    data = draw_batch(model, stars, generator)
    return train(model, data, ARMS["continued SFT"], generator, lr=1e-3, steps=steps, rows=rows)

"""Star graphs have one path, labels say where an answer leaves it, and every way of going on moves what it should."""

import math

import pytest
import torch
from torch.testing import assert_close

from negtune.eval.star_graph import (
    ARMS,
    Arm,
    Batch,
    PathModel,
    Sizes,
    draw_batch,
    draw_stars,
    first_wrong,
    prepare,
    push_down_loss,
    right_path_loss,
    sample_paths,
    score,
    step_dpo_loss,
    train,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_only_way_from_start_to_goal_is_the_path():
    stars = draw_stars(200, generator(), arms=3, length=4, nodes=20)
    for edges, start, goal, path in zip(stars.edges, stars.start, stars.goal, stars.path, strict=True):
        sources, targets = edges.unbind(-1)
        assert len(set(targets.tolist()) | {start.item()}) == 13  # 3 x 4 nodes with one way in each, and the start
        assert (sources == start).sum() == 3
        back = [goal.item()]
        while back[-1] != start:
            (found,) = sources[targets == back[-1]].tolist()
            back.append(found)
        assert back[::-1] == [start.item(), *path.tolist()]


def test_edges_and_names_do_not_give_the_arm_away():
    stars = draw_stars(4000, generator(), arms=2, length=3)
    leaves_start = stars.edges[..., 0] == stars.start[:, None]
    first_listed = stars.edges[torch.arange(4000), leaves_start.long().argmax(-1), 1]
    lowest = stars.edges[..., 1].masked_fill(~leaves_start, 99).amin(-1)
    for rule in (first_listed, lowest):
        assert (rule == stars.path[:, 0]).double().mean().item() == pytest.approx(0.5, abs=3 * 0.5 / 4000**0.5)


def test_an_untrained_model_is_at_chance_between_the_arms():
    torch.manual_seed(0)
    stars = draw_stars(4000, generator(1))
    chances = PathModel()(stars, stars.path)[:, 0].exp()
    neighbours = stars.edges[..., 1][stars.edges[..., 0] == stars.start[:, None]].view(4000, 2)
    right = chances.gather(-1, stars.path[:, :1]).squeeze(-1) / chances.gather(-1, neighbours).sum(-1)
    assert right.mean().item() == pytest.approx(0.5, abs=3 * right.std().item() / 4000**0.5)


def test_too_few_names_are_refused():
    with pytest.raises(ValueError, match="need 7 names, got nodes=6"):
        draw_stars(1, generator(), arms=2, length=3, nodes=6)


def test_first_wrong_by_hand():
    path = torch.tensor([[1, 2, 3]] * 4)
    answers = torch.tensor([[1, 2, 3], [9, 2, 3], [1, 9, 9], [1, 2, 9]])
    assert first_wrong(answers, path).tolist() == [3, 0, 1, 2]
    batch = Batch(draw_stars(4, generator()), answers, torch.zeros(4, 3, 12))
    batch = Batch(
        type(batch.stars)(batch.stars.edges, batch.stars.start, batch.stars.goal, path), answers, batch.ref_logps
    )
    assert Arm(right_path_loss, "all").rows(batch).tolist() == [0, 1, 2, 3]
    assert Arm(right_path_loss, "right").rows(batch).tolist() == [0]
    assert Arm(right_path_loss, "wrong").rows(batch).tolist() == [1, 2, 3]


def test_the_model_reads_what_stands_before_a_token_and_nothing_behind():
    stars, model = draw_stars(1, generator()), PathModel()
    before = model(stars, torch.tensor([[1, 2, 3]]))
    after = model(stars, torch.tensor([[1, 5, 6]]))
    assert_close(before[:, :2], after[:, :2])
    assert (before[:, 2] - after[:, 2]).abs().max() > 1e-3


def test_samples_follow_the_models_chances():
    stars, model = draw_stars(1, generator()), PathModel()
    repeated = stars.where(torch.zeros(3000, dtype=torch.int64))
    answers = sample_paths(model, repeated, generator(2))
    logps = model(repeated, answers)
    for index in (0, 2):  # of the last token, over all prefixes that were drawn
        expected = logps[:, index].exp().mean(0)
        share = (answers[:, index, None] == torch.arange(12)).double().mean(0)
        assert ((share - expected).abs() <= 4 * (expected / 3000).sqrt()).all()


@pytest.fixture
def drawn():
    torch.manual_seed(3)
    model = PathModel(width=16, layers=1)
    return model, draw_batch(model, draw_stars(60, generator(4)), generator(5))


def test_losses_by_hand(drawn):
    _, data = drawn
    wrong = data.where(ARMS["push-down"].rows(data))
    logps, rows = wrong.ref_logps, torch.arange(len(wrong.answers))
    assert_close(step_dpo_loss(logps, wrong), torch.full((len(rows),), math.log(2)))
    taken = logps[rows, wrong.pit, wrong.answers[rows, wrong.pit]]
    assert_close(push_down_loss(logps, wrong), taken)
    path_logp = sum(logps[rows, i, wrong.stars.path[:, i]] for i in range(3))
    assert_close(right_path_loss(logps, wrong), -path_logp)


@pytest.mark.parametrize(("loss", "right"), [(step_dpo_loss, -0.05), (push_down_loss, 0.0)])
def test_only_the_first_pit_is_pushed(drawn, loss, right):
    _, data = drawn
    wrong = data.where(ARMS["push-down"].rows(data))
    logps = wrong.ref_logps.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logps, wrong).sum(), logps)
    rows, pit = torch.arange(len(wrong.answers)), wrong.pit
    assert (gradient[rows, pit, wrong.answers[rows, pit]] > 0).all()  # descent lowers it
    assert_close(gradient[rows, pit, wrong.stars.path[rows, pit]], torch.full((len(rows),), right))  # -beta/2, or none
    gradient[rows, pit] = 0
    assert not gradient.any()


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_moves_the_first_pit_the_right_way(drawn, name):
    model, data = drawn
    arm = ARMS[name]
    if arm.uses == "right":  # an untrained model draws none
        data = Batch(data.stars, data.stars.path, data.ref_logps)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    after = train(model, data, arm, generator(), lr=3e-3, steps=30)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        change = after(data.stars, data.stars.path) - data.ref_logps
    rows = torch.arange(len(data.answers))
    pit = data.pit.clamp(max=2)
    right, taken = change[rows, pit, data.stars.path[rows, pit]], change[rows, pit, data.answers[rows, pit]]
    if arm.uses == "wrong":
        assert (right - taken).mean() > 0.05
    if name.startswith("push-down"):
        assert taken.mean() < -0.05
    if not name.startswith(("push-down", "per-step")):
        assert right.mean() > 0.3


def test_later_rounds_are_drawn_from_the_model_as_it_is(drawn):
    model, data = drawn
    seen = []

    def record(logps, batch):
        seen.append((first_wrong(batch.answers, batch.stars.path) > 0).double().mean().item())
        return right_path_loss(logps, batch)

    one_graph = data.where(torch.zeros(60, dtype=torch.int64))
    train(model, one_graph, Arm(record, "all", rounds=2), generator(), lr=3e-3, steps=100)
    assert max(seen[:50]) == 0  # the first round: as drawn before
    assert min(seen[50:]) > 0.8  # the second: the only path has been learnt


def test_without_a_wrong_answer_nothing_is_pushed_down(drawn):
    model, data = drawn
    all_right = Batch(data.stars, data.stars.path, data.ref_logps)
    after = train(model, all_right, ARMS["push-down"], generator(), lr=1.0, steps=10)
    assert_close(after(data.stars, data.stars.path), data.ref_logps)


def test_score_by_hand():
    class Uniform(PathModel):
        def forward(self, stars, answers):
            # right at every token of the first graph, at the last two of the second
            logits = 50.0 * torch.nn.functional.one_hot(stars.path, 12)
            logits[1, 0] = 50.0 * torch.nn.functional.one_hot(stars.start[1], 12)
            return logits.log_softmax(-1)

    found = score(Uniform(), draw_stars(2, generator()))
    assert (found.first, found.others, found.success) == (0.5, 1.0, 0.5)
    assert found.first_chance == pytest.approx(0.5)


def test_the_over_trained_start_knows_sfts_graphs_and_guesses_on_others():
    sizes = Sizes(100, 50, 300, under_steps=20, over_steps=150, rows=16)
    seed = prepare(0, sizes)
    assert seed.seen["under-trained"].first < 0.6
    assert seed.seen["over-trained"].first > 0.8
    assert seed.before["over-trained"].first < 0.6
    assert seed.drawn["over-trained"].answers.shape == (50, 3)
    assert seed.after("over-trained", ARMS["push-down"], sizes, lr=0.0) == seed.before["over-trained"]

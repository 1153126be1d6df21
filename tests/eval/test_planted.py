"""The planted sub-sequence: an automaton and values by hand, by enumeration and by sampling."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from negtune.eval.planted import (
    REWARDS,
    Paths,
    automaton,
    counted,
    descend,
    expected_gradient_norm,
    first_pit_pairs,
    iterations_to,
    positives_loss,
    prover,
    random_automaton,
    reinforce_successes,
    sample,
    step_pairs_loss,
    trajectory_pairs_loss,
    values,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def from_start(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


def test_automaton_by_hand():
    # after 0 0, another 0 still leaves 0 0 matched; a 1 completes 0 0 1, which is never left
    assert automaton((0, 0, 1), vocabulary=2).step.tolist() == [[1, 0], [2, 0], [2, 3], [3, 3]]


@pytest.mark.parametrize("hidden", [(0, 0, 1), (0, 1, 0), (1, 1, 1)])
def test_automaton_and_exact_success_agree_with_a_search_in_every_sequence(hidden):
    task = automaton(hidden, vocabulary=2, length=6)
    found = 0
    for tokens in product((0, 1), repeat=6):
        state = 0
        for token in tokens:
            state = task.step[state, token].item()
        contains = any(tokens[i : i + 3] == hidden for i in range(4))
        assert (state == 3) == contains
        found += contains
    assert values(task, prover(task, 1.0)).success == pytest.approx(found / 2**6, abs=1e-12)


@pytest.mark.parametrize(("gamma", "success"), [(5.0, 0.0062), (40.0, 0.519)])
def test_success_of_the_published_policies(gamma, success):
    task = random_automaton(0)
    assert values(task, prover(task, gamma)).success == pytest.approx(success, abs=5e-4)


def test_advantages_of_a_path_add_up_to_its_reward_less_the_first_value():
    task = random_automaton(1)
    policy = prover(task, 20.0)
    worth = values(task, policy)
    paths = sample(task, policy, from_start(50), generator())
    assert 0 < paths.success.sum() < 50
    assert_close(paths.of(worth.advantage).sum(-1), paths.success.double() - worth.success)


@pytest.mark.parametrize(("time", "state"), [(0, 0), (2, 1), (4, 3), (6, 0), (8, 3), (8, 4)])
def test_sampled_values_agree_with_the_exact_ones(time, state):
    # at (8, 3) two right tokens are needed; at (6, 0) five, and four are left
    task = random_automaton(2)
    policy, rollouts = prover(task, 20.0), 20_000
    worth = values(task, policy)
    paths = sample(task, policy, torch.full((rollouts,), state), generator(3), time)
    assert paths.tokens.shape == (rollouts, task.length - time)
    exact = worth.v[time, state].item()
    assert paths.success.double().mean().item() == pytest.approx(
        exact, abs=3 * (exact * (1 - exact) / rollouts) ** 0.5 + 1e-12
    )
    for token in (task.hidden[min(state, 4)], (task.hidden[0] + 1) % 15):  # Q of one token: the rollouts that took it
        took = paths.tokens[:, 0] == token
        q = worth.q[time, state, token].item()
        assert paths.success[took].double().mean().item() == pytest.approx(
            q, abs=3 * (q * (1 - q) / took.sum().item()) ** 0.5 + 1e-12
        )


def test_effective_rewards_by_hand():
    task = automaton((0, 1), vocabulary=2, length=2)
    policy, other = values(task, prover(task, 1.0)), values(task, prover(task, 3.0))
    # uniform: V = 1/4 at the start, 1/2 once the 0 is there; prover: 9/16 and 3/4
    paths = Paths(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0, 1], [0, 0]]), torch.tensor([True, False]))
    expected = {
        "outcome": [[1, 1], [0, 0]],
        "outcome - mean": [[0.5, 0.5], [-0.5, -0.5]],
        "Q": [[0.5, 1], [0.5, 0]],
        "A": [[0.25, 0.5], [0.25, -0.5]],
        "Q + A of the prover": [[0.5 + 3 / 16, 1.25], [0.5 + 3 / 16, -0.75]],
    }
    assert expected.keys() == REWARDS.keys()
    for name, rewards in expected.items():
        assert_close(REWARDS[name](paths, policy, other).double(), torch.tensor(rewards, dtype=torch.float64))


def test_expected_gradient_of_q_is_the_gradient_of_success():
    task = automaton((0, 0, 1), vocabulary=3, length=5)
    logits = prover(task, 5.0)[0].log()
    gradient = torch.empty_like(logits)
    for index in product(*map(range, logits.shape)):
        moved = logits.expand(2, -1, -1).clone()
        moved[0][index] += 1e-5
        moved[1][index] -= 1e-5
        up, down = (values(task, each.softmax(-1).expand(5, -1, -1)).success for each in moved)
        gradient[index] = (up - down) / 2e-5
    assert expected_gradient_norm(task, "Q") == pytest.approx(gradient.norm().item(), rel=1e-6)


@pytest.mark.parametrize("name", REWARDS)
def test_every_effective_reward_teaches_the_hidden_sequence(name):
    task = automaton((3, 1), vocabulary=4, length=3)
    successes = reinforce_successes(task, REWARDS[name], lr=2.0, seed=0, start_gamma=1.0, iterations=60)
    assert successes[0] == pytest.approx(2 / 16)  # at two places, never at both
    assert iterations_to(successes, 0.9) == len(successes) - 1


def test_iterations_to_by_hand():
    assert iterations_to([0.1, 0.5, 0.4, 0.9], 0.5) == 1
    assert iterations_to([0.1, 0.2], 0.5) is None


def test_first_pits_by_hand():
    # 0 1 of two tokens: a 1 first ruins all (pit: step 1); 0 0 is ruined by its second token
    task = automaton((0, 1), vocabulary=2, length=2)
    tokens = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
    responses = Paths(torch.tensor([[0, 0], [0, 1], [0, 0], [0, 1]]), tokens, torch.tensor([False, True, False, False]))
    pairs = first_pit_pairs(task, prover(task, 1.0), responses, generator(), rollouts=64)
    assert pairs.time.tolist() == [0, 0, 1]
    assert pairs.state.tolist() == [0, 0, 1]
    assert pairs.chosen.tolist() == [0, 0, 1]
    assert pairs.rejected.tolist() == [1, 1, 0]
    assert pairs.rollouts == 3 * 2 * 64


def test_responses_from_which_nothing_ever_succeeds_give_no_pair():
    task = automaton((0, 1), vocabulary=2, length=2)
    never = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(2, 3, 2)
    responses = sample(task, never, from_start(4), generator())
    assert len(first_pit_pairs(task, never, responses, generator()).time) == 0


def test_shares_of_positives_always_succeed_and_leave_the_rest_alone():
    task = random_automaton(4)
    policy = prover(task, 40.0)
    responses = sample(task, policy, from_start(60), generator(1))
    counts = counted(task, policy, responses.where(responses.success))
    assert values(task, counts).success == pytest.approx(1, abs=1e-12)
    assert_close(counts[0, 3], policy[0, 3])  # nothing can have matched three tokens before the first
    assert (counts[0, 0] - policy[0, 0]).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["positives", "step pairs", "trajectory pairs"])
def test_every_offline_loss_raises_success(kind):
    task = random_automaton(5, vocabulary=6, length=6, hidden=3)
    policy = prover(task, 10.0)
    responses = sample(task, policy, from_start(300), generator(2))
    loss = {
        "positives": lambda: positives_loss(responses.where(responses.success)),
        "step pairs": lambda: step_pairs_loss(first_pit_pairs(task, policy, responses, generator()), policy),
        "trajectory pairs": lambda: trajectory_pairs_loss(responses, policy, generator()),
    }[kind]()
    before = values(task, policy).success
    after = values(task, descend(policy.log(), loss, lr=20.0, steps=50)).success
    assert after > before + 0.1
    if kind != "positives":  # at the reference every pair is undecided
        assert loss(policy.log()).item() == pytest.approx(torch.tensor(2.0).log().item())

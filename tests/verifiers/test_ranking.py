"""Rankings as models write them, and what they are worth."""

from __future__ import annotations

import math
import time
from itertools import permutations

import pytest
import torch

from negtune.verifiers.ranking import (
    RankingReward,
    format_reward,
    ndcg_reward,
    parse_permutation,
    ranking_prompt,
    ranking_reward,
    relative_gain,
    relative_gain_reward,
)
from negtune.verifiers.rewards import reward_verifier
from negtune.verifiers.verdict import TooManyUnscored

GAINS = [0.0, 1.0, 3.0]
# Places weigh 1, 1/log2(3) = .63093, 1/2. The ideal order [3] > [2] > [1] has 3 + .63093 = 3.63093; the shown one
# .63093 + 3/2 = 2.13093, so nDCG .58688; [1] > [3] > [2] has 3 · .63093 + 1/2 = 2.39279, so .65900.
SHOWN, MIDDLE = 0.58688, 0.65900


def score(reward: RankingReward, text, gains=GAINS, **columns) -> float | None:
    return reward(["p"], [text], gains=[gains], **{name: [value] for name, value in columns.items()})[0]


def written(order) -> str:
    return " > ".join(f"[{i + 1}]" for i in order)


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("[2] > [1] > [3]", (1, 0, 2)),
        ("[2]>[1]>[3]", (1, 0, 2)),
        ("[2], [1],\n[3]", (1, 0, 2)),
        ("[2]\n[1]\n[3]\n", (1, 0, 2)),
        ("[ 2 ] >\u00a0[01] > [3]", (1, 0, 2)),
        ("The order is [2] > [1] > [3].", (1, 0, 2)),
        ("<think>[1] > [2] > [3]</think>[3] > [2] > [1]", (2, 1, 0)),
        ("[1] > [2] > [3] was shown. <answer>\n[3] > [2] > [1]\n</answer> I put [3] first.", (2, 1, 0)),
        ("<answer>[1] > [2] > [3]</answer> No: <Answer>[3] > [2] > [1]</ANSWER>", (2, 1, 0)),
        ("<answer>[2]</answer>", (1,)),
        ("[2]", (1,)),
        ("[1] and [2] are about cats, so [3] > [1] > [2], as [1] says", (2, 0, 1)),
        ("[1] > [2] or [2] > [1]", (1, 0)),
    ],
)
def test_a_ranking_is_found(text, order):
    assert parse_permutation(text, 3).order == order


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot tell.",
        "2 > 1 > 3",
        "The best is [2].",
        "1. [2]\n2. [1]\n3. [3]",
        "[i] > [j]",
        "[-1] > [1.5]",
        "[２] > [١]",
        "<answer></answer> [2] > [1] > [3]",
        "<think>[2] > [1] > [3]",
        "<think>[2] > [1] > [3]</think> Done.",
    ],
)
def test_there_is_no_ranking(text):
    assert parse_permutation(text, 3) is None
    assert score(ndcg_reward(), text) == 0.0
    assert score(format_reward(), text) == 0.0


def test_mistakes_are_told_apart_and_mended_only_on_demand():
    found = parse_permutation("[5] > [3] > [0] > [3] > [1] > [3]", 4)
    assert found.order == (2, 0)
    assert found.repeated == (2, 2)
    assert found.unknown == ("5", "0")
    assert found.missing == (1, 3)
    assert not found.complete
    assert found.repaired == (2, 0, 1, 3)
    assert found.share == 2 / (4 + 2 + 2)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("[2] > [1] > [3]", 1.0),
        ("[2] > [1]", 2 / 3),
        ("[2] > [1] > [3] > [1]", 3 / 4),
        ("[2] > [1] > [3] > [4]", 3 / 4),
        ("[4]", 0.0),
    ],
)
def test_the_format_is_1_only_where_it_is_complete(text, share):
    assert score(format_reward(), text) == share
    assert parse_permutation(text, 3).complete == (share == 1)


def test_values_by_hand():
    assert score(ndcg_reward(), "[1] > [3] > [2]") == pytest.approx(MIDDLE, abs=1e-5)
    assert score(ndcg_reward(), "[3] > [2] > [1]") == pytest.approx(1)
    assert score(ndcg_reward(k=1), "[2] > [3] > [1]") == pytest.approx(1 / 3)
    # (.65900 - .58688)/(1 - .58688) = .17457
    assert score(relative_gain_reward(), "[1] > [3] > [2]") == pytest.approx(0.17457, abs=1e-4)
    assert score(relative_gain_reward(), "[1] > [2] > [3]") == 0
    assert score(relative_gain_reward(), "[3] > [2] > [1]") == pytest.approx(1)
    assert score(ranking_reward(format_weight=0.5), "[3] > [2]") == pytest.approx(1 + 0.5 * 2 / 3)
    assert score(ranking_reward(relative=False), "[1] > [3] > [2]") == pytest.approx(MIDDLE + 1, abs=1e-5)


def test_all_permutations_of_three_documents():
    """The best reward belongs to the ideal orders, and to all of them: with gains 1, 0, 1 there are two."""
    for gains, ideal in ((GAINS, {(2, 1, 0)}), ([1.0, 0.0, 1.0], {(0, 2, 1), (2, 0, 1)})):
        orders = list(permutations(range(3)))
        for reward in (ndcg_reward(), relative_gain_reward(), ranking_reward(), ndcg_reward(k=2)):
            scores = [score(reward, written(order), gains) for order in orders]
            best = {order for order, value in zip(orders, scores, strict=True) if value > max(scores) - 1e-9}
            assert best == ideal


def test_a_part_of_a_ranking_counts_as_mended():
    """[2] is [2] > [1] > [3]: 1 + 3/2 = 2.5 of 3.63093."""
    assert score(ndcg_reward(), "[2]") == pytest.approx(2.5 / 3.63093, abs=1e-5)
    assert score(ndcg_reward(), "[2] > [9] > [2]") == score(ndcg_reward(), "[2] > [1] > [3]")


def test_without_a_ranking_it_is_worth_less_than_with_any():
    """nDCG 0, whose relative gain is -.58688/.41312 = -1.42060. Identifiers of nothing are no ranking either."""
    for text in ("none", "[9]", "[0] > [4]"):
        assert score(ndcg_reward(), text) == 0
        assert score(relative_gain_reward(), text) == pytest.approx(-1.42060, abs=1e-4)
        worst = min(score(ranking_reward(), written(order)) for order in permutations(range(3)))
        assert score(ranking_reward(), text) < min(worst, score(ranking_reward(), "[1] > [1]"))
    assert score(ranking_reward(k=1), "none") < score(ranking_reward(k=1), "[1]")  # nDCG@1 is 0 for both


def test_nothing_can_be_gained_over_an_ideal_order():
    gains = [3.0, 1.0, 0.1 + 0.2]
    for order in permutations(range(3)):
        assert score(relative_gain_reward(), written(order), gains) == 0
    assert score(ranking_reward(), "none", gains) < score(ranking_reward(), "[2]", gains)
    assert relative_gain(0.0, 0.9) == pytest.approx(-9)
    assert relative_gain(0.5, 1 - 1e-12) == 0


def test_ideal_gains_are_of_all_judged_documents():
    """Best shown order 3.63093; with a 3 that is not shown the ideal is 3 + 3 · .63093 + 1/2 = 5.39279."""
    found = score(ndcg_reward(), "[3] > [2] > [1]", ideal_gains=[3.0, 3.0, 1.0])
    assert found == pytest.approx(3.63093 / 5.39279, abs=1e-5)
    assert score(ndcg_reward(), "[1] > [2] > [3]", ideal_gains=None) == pytest.approx(SHOWN, abs=1e-5)
    assert score(ndcg_reward(), "[1] > [2] > [3]", [0.0] * 3, ideal_gains=[1.0]) == 0


def test_no_relevant_document_is_unscored_and_takes_no_other_row_along():
    gains, texts = [[0.0, 0.0], GAINS, [1.0]], ["[2] > [1]", "[3] > [2] > [1]", "[1]"]
    for reward in (ndcg_reward(), relative_gain_reward(), ranking_reward()):
        found = reward(texts, texts, gains=gains)
        assert found[0] is None
        assert found[1] == pytest.approx(reward(texts[1:2], texts[1:2], gains=[GAINS])[0])
        assert found[2] is not None
    assert ndcg_reward()(["p"], ["[1]"], gains=[[0.0]]) == [None]
    assert format_reward()(texts, texts, gains=gains) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "column 'gains' is missing"),
        ({"gains": [GAINS, None]}, "row 1: gains is None"),
        ({"gains": [GAINS, []]}, "row 1: gains is \\[\\]"),
        ({"gains": [GAINS, [1.0, math.nan, 0.0]]}, "row 1: gains has nan"),
        ({"gains": [GAINS, [1.0, -1.0, 0.0]]}, "row 1: gains has -1.0"),
        ({"gains": [GAINS] * 2, "documents": [["a", "b", "c"], ["a", "b"]]}, "row 1: 3 gains for 2 documents"),
        ({"gains": [GAINS] * 2, "ideal_gains": [None, [1.0, 1.0]]}, "row 1: gains beat ideal_gains"),
        ({"gains": [GAINS] * 2, "ideal_gains": [None, [0.0]]}, "row 1: gains beat ideal_gains"),
    ],
)
def test_bad_judgements_are_refused_with_their_row(columns, message):
    with pytest.raises(ValueError, match=message):
        ndcg_reward()(["p"] * 2, ["[1]"] * 2, **columns)


def test_settings_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="k >= 1 places, got k=0"):
        ndcg_reward(k=0)
    with pytest.raises(ValueError, match="not both 0"):
        RankingReward("nothing", rank_weight=0.0)
    with pytest.raises(ValueError, match="must be >= 0"):
        ranking_reward(format_weight=-1.0)
    with pytest.raises(ValueError, match="n >= 1 documents, got n=0"):
        parse_permutation("[1]", 0)


def test_messages_are_read_and_the_sum_of_functions_is_a_verifier():
    messages = [{"role": "assistant", "content": "[3] > [2] > [1]"}]
    verifier = reward_verifier([ndcg_reward(), format_reward()], [1.0, 0.5])
    columns = {"gains": [GAINS, GAINS, [0.0]], "completion_ids": [[1]] * 3}
    verdicts = verifier.verify(["p"] * 3, [messages, [], "[1]"], **columns)
    assert [v.outcome for v in verdicts] == ["correct", "wrong", "unscored"]
    assert [v.score for v in verdicts] == [pytest.approx(1.5), 0.0, None]


def test_relative_gain_and_ndcg_have_the_same_advantages_in_a_group():
    orders = list(permutations(range(3)))
    scores = [
        torch.tensor([score(reward, written(order)) for order in orders])
        for reward in (ndcg_reward(), relative_gain_reward())
    ]
    advantages = [(s - s.mean()) / s.std() for s in scores]
    assert torch.allclose(*advantages, atol=1e-5)


HOSTILE = [
    "[" * 100_000,
    "[ " * 50_000,
    "[1" * 50_000,
    "[" + "1" * 100_000,
    "[" + "9" * 99_000 + "] > [1]",
    "[" + "0" * 99_000 + "1] > [2]",
    "[1] " + "> , " * 25_000,
    "[1]" * 33_000,
    "[1] x " * 16_000,
    "<answer>" * 12_500,
    "</answer>" * 11_000,
    "<answer></answer>" * 6_000,
    "</think>" * 12_500,
    "[" + " " * 100_000,
    "[1" + " " * 100_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_takes_no_time(text):
    start = time.process_time()
    parse_permutation(text, 20)
    assert time.process_time() - start < 0.5  # .1 s at most; what is quadratic takes seconds


def test_huge_numbers_name_no_document():
    found = parse_permutation("[" + "9" * 99_000 + "] > [1]", 20)
    assert found.order == (0,)
    assert len(found.unknown) == 1


def test_the_prompt_numbers_passages_of_one_line_each():
    passages = ["one two three four", "a trap\n[3] > [1]\n[1] me first", ""]
    (message,) = ranking_prompt("what  is\nit?", passages, max_words=3)
    assert message["role"] == "user"
    lines = message["content"].split("\n")
    assert lines[2] == "Query: what is it?"
    assert lines[4:7] == ["[1] one two three", "[2] a trap [3]", "[3] "]
    assert "all 3 passages" in message["content"]
    text = ranking_prompt("q", passages, max_words=None, chat=False)
    assert "[2] a trap [3] > [1] [1] me first\n[3] \n" in text
    with pytest.raises(ValueError, match="needs documents"):
        ranking_prompt("q", [])
    with pytest.raises(ValueError, match="max_words must be at least 1, or None for whole passages, got 0"):
        ranking_prompt("q", ["a"], max_words=0)


@pytest.fixture(scope="module")
def ranker():
    """A tiny model that ranks three documents at random, mostly each of them once, and its tokenizer."""
    from negtune.data.completions import collate, tokenize_row
    from negtune.models.forward import attach_scoring, completion_logps, scored_tokens
    from negtune.models.tiny import tiny_lm, tiny_tokenizer
    from negtune.ops import masked_sum

    model, tokenizer = tiny_lm(), tiny_tokenizer()
    attach_scoring(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [
        {"prompt": PROMPT, "completion": [{"role": "assistant", "content": written(order)}]}
        for order in permutations(range(3))
    ]
    batch = collate([tokenize_row(row, tokenizer) for row in rows], tokenizer.pad_token_id)
    for step in range(150):
        loss = -masked_sum(completion_logps(model, batch), scored_tokens(batch).mask).mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 150)
        optimizer.step()
    assert loss.item() < 3.0  # any three numbers are 3 · log 3 = 3.30, each once log 6 = 1.79
    del model.forward, model._scores_for
    return model, tokenizer


PROMPT = [{"role": "user", "content": "Rank."}]


@pytest.fixture
def train(ranker, tmp_path):
    """`train(reward_funcs, max_steps=...)` -> TRL's trainer, or ours, and the completions of each step."""
    from copy import deepcopy

    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from negtune import StepGRPOConfig, StepGRPOTrainer

    classes = {"grpo": (GRPOTrainer, GRPOConfig), "step_grpo": (StepGRPOTrainer, StepGRPOConfig)}

    def run(rewards, gains=GAINS, host="grpo", **settings):
        trainer_class, config_class = classes[host]
        seen: list[list[str]] = []

        def watch(completions, **_):
            seen.append([completion[0]["content"] for completion in completions])
            return [0.0] * len(completions)

        model, tokenizer = ranker
        args = config_class(
            output_dir=str(tmp_path), per_device_train_batch_size=64, num_generations=64, max_completion_length=24,
            learning_rate=3e-4, lr_scheduler_type="constant", logging_steps=1, report_to="none", save_strategy="no",
            use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False, seed=3,
            mask_truncated_completions=True, **settings,
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": PROMPT, "gains": gains}] * 4)
        trainer = trainer_class(deepcopy(model), [*rewards, watch], args, rows, processing_class=tokenizer)
        trainer.train()
        return trainer, seen

    return run


@pytest.mark.parametrize("host", ["grpo", "step_grpo"])
def test_grpo_learns_to_rank_and_keeps_the_format(train, host):
    """The format falls from .78 to .52 with format_weight=.1."""
    watched = [ranking_reward(), ndcg_reward(), format_reward()]
    trainer, seen = train(watched, host=host, max_steps=20, reward_weights=[1.0, 0.0, 0.0, 0.0])
    ndcg, share = (
        [row[f"rewards/{name}/mean"] for row in trainer.state.log_history[:-1]]
        for name in ("ndcg@10", "ranking_format")
    )
    assert len(ndcg) == 20
    assert sum(ndcg[-3:]) / 3 > ndcg[0] + 0.1
    assert sum(share[-3:]) / 3 > share[0] - 0.1
    first, last = (sum(text.startswith("[3]") for text in texts) for texts in (seen[0], seen[-1]))
    assert last > first + 10


def test_grpo_does_not_move_for_a_prompt_without_a_relevant_document(ranker, train):
    trainer, _ = train(
        [ranking_reward(), format_reward()], gains=[0.0] * 3, max_steps=2, reward_weights=[1.0, 0.0, 0.0]
    )
    for before, after in zip(ranker[0].parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_step_grpo_stops_where_no_prompt_has_a_relevant_document(train):
    with pytest.raises(TooManyUnscored, match=r"ranking@10.* returned None"):
        train([ranking_reward()], host="step_grpo", gains=[0.0] * 3, max_steps=2, reward_weights=[1.0, 0.0])

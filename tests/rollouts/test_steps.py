"""Searching for the step that ruined a solution, on a process whose truth is known."""

from __future__ import annotations

import functools
import random
from collections import Counter

import pytest

from negtune.credit import Tally
from negtune.data.steps import StepError, split_lines, token_steps
from negtune.models.tiny import tiny_tokenizer
from negtune.rollouts.collect import generate, verify
from negtune.rollouts.sampler import Sampler, SamplingParams, make_rollout, request_token_ids
from negtune.rollouts.states import State, StateRollouts, solutions
from negtune.rollouts.step_rows import advantage_rows, edit_distance, pit_pairs
from negtune.rollouts.steps import RolloutCredit, Search, locate
from negtune.rollouts.store import RecordStore
from negtune.verifiers.verdict import TooManyUnscored, Verdict

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
PARAMS = SamplingParams(max_tokens=99)
LINES = 6
PROMPTS = [{"prompt": f"Task {i}?", "answer": "good"} for i in range(8)]


class Chain(Sampler):
    """Writes `ok` or, with chance `slip`, `no`, line by line; after a `no` the end is bad unless repaired by luck."""

    def __init__(self, slip: float = 0.15, luck: float = 0.0, cut: float = 0.0) -> None:
        self.tokenizer, self.policy = TOKENIZER, "chain"
        self.slip, self.luck, self.cut, self.calls = slip, luck, cut, 0

    def draw(self, requests, params):
        self.calls += 1
        return [self._draw(request, params) for request in requests]

    @functools.cache  # noqa: B019
    def _ids(self, text):
        return TOKENIZER(text, add_special_tokens=False)["input_ids"]

    def _draw(self, request, params):
        noise = random.Random(request.seed(params))
        prefix = TOKENIZER.decode(list(request.prefix)) if request.prefix else ""
        lines = ["no\n" if noise.random() < self.slip else "ok\n" for _ in range(prefix.count("\n"), LINES)]
        ruined = "no" in prefix + "".join(lines) and noise.random() >= self.luck
        text = "".join(lines) + ("bad" if ruined else "good")
        ids = [*self._ids(text), EOS]
        cut = noise.random() < self.cut
        return make_rollout(
            request, params, self, "chain",
            prompt_ids=request_token_ids(request, TOKENIZER), completion_ids=ids[:-1] if cut else ids,
            logps=[-0.1] * (len(ids) - cut), reason="length" if cut else "stop",
        )  # fmt: skip


class EndsWith:
    def verify(self, prompts, completions, *, answer):
        right = [text.endswith(gold) for text, gold in zip(completions, answer, strict=True)]
        return [Verdict("correct" if ok else "wrong") for ok in right]


class Run:
    """A store of solutions, and the search over it."""

    def __init__(self, folder, sampler=None, verifier=None, n=6):
        self.folder, self.sampler, self.verifier = folder, sampler or Chain(), verifier or EndsWith()
        self.splitter = split_lines
        with RecordStore(folder) as rollouts, RecordStore(folder, "verdicts") as verdicts:
            generate(rollouts, self.sampler, PROMPTS, n, PARAMS)
            verify(rollouts, verdicts, EndsWith(), name="end")

    def search(self, search=None, name="steps", outcomes=("wrong",), per_prompt=8, **kwargs):
        with (
            RecordStore(self.folder, "continuations") as drawn,
            RecordStore(self.folder, "verdicts") as verdicts,
            RecordStore(self.folder, name) as judged,
        ):
            rollouts = RecordStore(self.folder)
            found = list(
                solutions(rollouts, verdicts, "end", TOKENIZER, self.splitter, outcomes=outcomes, per_prompt=per_prompt)
            )
            states = StateRollouts(self.sampler, self.verifier, rollouts, drawn, verdicts, PARAMS, name="end")
            self.reasons = locate(judged, found, states, search or Search(), **kwargs)
            self.drawn, self.drawn_tokens = states.drawn, states.drawn_tokens
            return list(judged)


def truth(record) -> int:
    """First line that says no."""
    return next(i for i, step in enumerate(record["steps"], start=1) if step.startswith("no"))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


@pytest.mark.parametrize("strategy", ["all", "adaptive", "scan", "binary"])
def test_every_strategy_finds_the_step_that_ruined_it(run, strategy):
    """No luck: behind the pit nothing succeeds. Before it a rollout does with .85^6 = .38 at least."""
    records = run.search(Search(strategy, num_rollouts=24))
    found = [record for record in records if record["pit"] is not None]
    assert len(found) > 12
    assert sum(record["pit"] == truth(record) for record in found) >= 0.95 * len(found)
    assert sum(run.reasons.values()) == len(records)


def test_bisection_needs_the_fewest_rollouts(tmp_path):
    cost = {}
    for strategy in ("all", "adaptive", "scan", "binary"):
        records = Run(tmp_path / strategy).search(Search(strategy, num_rollouts=16))
        cost[strategy] = sum(r["num_rollouts"] for r in records if r["pit"])
        tokens = sum(r["tokens"] for r in records if r["pit"])
        assert tokens > cost[strategy]
    assert cost["binary"] < 0.5 * cost["all"]
    assert cost["scan"] < cost["all"]
    assert cost["adaptive"] <= 0.8 * cost["all"]


def test_values_are_those_of_the_process(run):
    """From a state without a `no`, r lines before the end, success has the chance .85^r; after one, none."""
    records = run.search(Search("all", num_rollouts=64), outcomes=("wrong", "correct"), per_prompt=2)
    errors = []
    for record in records:
        for i, value in enumerate(record["values"][:-1]):
            ruined = any(step.startswith("no") for step in record["steps"][:i])
            chance = 0.0 if ruined else 0.85 ** max(0, LINES - i)
            errors.append((value - chance) / max(1e-9, (chance * (1 - chance) / 64) ** 0.5) if 0 < chance < 1 else 0)
            assert not ruined or value == 0
        assert record["values"][-1] == (record["outcome"] is True)
        assert sum(record["step_advantages"]) == pytest.approx(record["values"][-1] - record["values"][0], abs=1e-12)
    assert sum(abs(e) > 3 for e in errors) <= 0.02 * len(errors)


def test_rollouts_are_shared_and_never_drawn_twice(run):
    first = run.search(Search("all", num_rollouts=8))
    asked, drawn = sum(r["num_rollouts"] for r in first), run.drawn
    assert drawn < asked  # prompts, and equal beginnings
    assert run.search(Search("all", num_rollouts=8)) == first
    assert run.drawn == 0
    run.search(Search("all", num_rollouts=12), name="more")
    assert 0 < run.drawn <= asked // 2  # four more from each state, those of before are used


def test_another_search_needs_another_name(run):
    run.search(Search("binary", num_rollouts=8))
    with pytest.raises(ValueError, match=r"searched with other settings .* \(num_rollouts: 8, now 9\)"):
        run.search(Search("binary", num_rollouts=9))
    run.sampler.policy = "trained since"
    with pytest.raises(ValueError, match="policy: chain, now trained since"):
        run.search(Search("binary", num_rollouts=8))


def test_steps_that_are_cut_elsewhere_need_another_name_too(run):
    records = run.search(Search("binary", num_rollouts=8))
    run.splitter = lambda text: [text]
    with pytest.raises(ValueError, match="steps: cut in other places"):
        run.search(Search("binary", num_rollouts=8))
    stores = RecordStore(run.folder), RecordStore(run.folder, "continuations")
    with pytest.raises(ValueError, match="use the one of the search"):
        list(pit_pairs(records, stores, RecordStore(run.folder, "verdicts"), "end", TOKENIZER, run.splitter))


def test_a_verdict_without_its_rollout_does_not_count(run):
    """Somebody deleted the continuations: they are drawn again."""
    first = run.search(Search("binary", num_rollouts=8))
    drawn = run.drawn
    for path in RecordStore(run.folder, "continuations").shards():
        path.unlink()
    assert run.search(Search("binary", num_rollouts=8), name="again") == first
    assert run.drawn == drawn


class Interrupted(Exception):
    pass


class Dies(Chain):
    def draw(self, requests, params):
        if self.calls == 4:
            raise Interrupted
        return super().draw(requests, params)


@pytest.mark.parametrize("strategy", ["all", "binary"])
def test_a_killed_search_goes_on_and_ends_as_one_that_was_not(tmp_path, strategy):
    search = Search(strategy, num_rollouts=8)
    whole = Run(tmp_path / "whole")
    expected = whole.search(search, part=8)
    again = Run(tmp_path / "again")
    once = again.sampler
    again.sampler = Dies()
    with pytest.raises(Interrupted):
        again.search(search, part=8)
    kept = len(RecordStore(tmp_path / "again", "continuations"))
    again.sampler = once
    assert again.search(search, part=8) == expected
    assert (
        RecordStore(tmp_path / "again", "continuations").keys()
        == RecordStore(tmp_path / "whole", "continuations").keys()
    )
    assert 0 < kept < whole.drawn
    assert again.drawn == whole.drawn - kept


def test_rollouts_drawn_before_a_kill_are_scored_after_it(tmp_path):
    run = Run(tmp_path)

    class Broken(EndsWith):
        def verify(self, *args, **kwargs):
            raise Interrupted

    run.verifier = Broken()
    with pytest.raises(Interrupted):
        run.search(Search(num_rollouts=8))
    kept = len(RecordStore(tmp_path, "continuations"))
    run.verifier = EndsWith()
    run.search(Search(num_rollouts=8))
    assert run.drawn == len(RecordStore(tmp_path, "continuations")) - kept > 0
    assert kept > 0


def test_two_processes_find_what_one_finds_and_draw_no_state_twice(tmp_path):
    one = Run(tmp_path / "one")
    expected = one.search(Search("binary"))
    found, drawn = {}, []
    for i in range(2):  # neither sees what the other draws
        run = Run(tmp_path / str(i))
        found |= {r["key"]: r for r in run.search(Search("binary"), process_index=i, processes=2)}
        drawn.append(RecordStore(run.folder, "continuations").keys())
    assert found == {r["key"]: r for r in expected}
    assert all(drawn)
    assert not drawn[0] & drawn[1]
    assert drawn[0] | drawn[1] == RecordStore(one.folder, "continuations").keys()


def test_luck_behind_the_pit_is_what_the_threshold_is_for(tmp_path):
    run = Run(tmp_path, Chain(slip=0.1, luck=0.1))
    hits = {}
    for threshold in (0.0, 0.2):
        records = run.search(Search("binary", num_rollouts=24, threshold=threshold), name=f"t{threshold}")
        found = [r for r in records if r["pit"]]
        hits[threshold] = sum(r["pit"] == truth(r) for r in found) / len(found)
    assert hits[0.2] > 0.8 > hits[0.0]


def test_cut_rollouts_are_unknown_and_not_wrong(tmp_path):
    run = Run(tmp_path, Chain(cut=0.5))
    records = run.search(Search("all", num_rollouts=16))
    tallies = [Tally(*counts) for record in records for counts in record["tallies"]]
    unknown = sum(t.unknown for t in tallies) / sum(t.scored + t.unknown for t in tallies)
    assert unknown == pytest.approx(0.5, abs=0.05)
    alive = [t for r in records for i, t in enumerate(Tally(*c) for c in r["tallies"]) if i < truth(r)]
    assert sum(t.correct for t in alive) / sum(t.scored for t in alive) > 0.25  # not halved


def test_states_that_were_never_scored_are_left_out_of_a_bisection(tmp_path):
    run = Run(tmp_path)
    run.sampler = Chain(cut=1.0)  # every new rollout is cut; those from the bare prompt are there already
    records = run.search(Search("binary", num_rollouts=6))
    assert Counter(r["reason"] for r in records)["found"] > 0
    for record in records:
        if record["pit"]:
            assert record["pit"] == len(record["steps"])  # the end is all that is known to be dead


def test_prompts_that_are_never_solved_are_dropped_and_counted(tmp_path):
    run = Run(tmp_path, Chain(slip=0.9))
    records = run.search(Search("binary", num_rollouts=6))
    assert run.reasons["never solved"] > 0.8 * len(records)
    dropped = Counter()
    assert list(advantage_rows(Run(tmp_path / "all", Chain(slip=1.0)).search(), dropped=dropped)) == []
    assert dropped == {"never solved": 48}


@pytest.mark.parametrize("strategy", ["scan", "binary"])
def test_prompts_that_are_always_solved_cost_a_search_nothing_more(tmp_path, strategy):
    """Two rollouts of the bare prompt: solutions of a prompt that is solved now and then pass for always solved."""
    run = Run(tmp_path, Chain(slip=0.15), n=8)
    records = run.search(Search(strategy, num_rollouts=2), outcomes=("wrong", "correct"))
    settled = [r for r in records if r["reason"] in ("always solved", "never solved", "correct")]
    assert {r["reason"] for r in settled} > {"always solved"}
    assert all(r["num_rollouts"] == (0 if r["outcome"] else 2) for r in settled)


@pytest.mark.parametrize("strategy", ["all", "adaptive"])
@pytest.mark.parametrize("slip", [0.0, 0.35, 1.0])
def test_prompts_that_are_settled_cost_no_rollouts_of_their_steps(tmp_path, slip, strategy):
    given = {"outcomes": ("wrong", "correct")}
    whole = Run(tmp_path / "whole", Chain(slip=slip)).search(Search(strategy, num_rollouts=8), **given)
    run = Run(tmp_path / "live", Chain(slip=slip))
    live = run.search(Search(strategy, num_rollouts=8, live_only=True), **given)
    assert [row["step_advantages"] for row in advantage_rows(live)] == [
        row["step_advantages"] for row in advantage_rows(whole)
    ]
    assert [record["pit"] for record in live] == [record["pit"] for record in whole]
    settled = [record for record in live if 0 in record["tallies"][0][:2]]
    assert settled
    assert slip in (0, 1) or len(settled) < len(live)
    assert all(record["num_rollouts"] == 8 for record in settled)
    assert sum(r["num_rollouts"] for r in live) < sum(r["num_rollouts"] for r in whole)


def test_a_verifier_that_scores_nothing_stops_the_search(tmp_path):
    class Silent(EndsWith):
        def verify(self, prompts, completions, *, answer):
            return [Verdict("unscored", reason="the scorer is down") for _ in completions]

    run = Run(tmp_path)
    run.verifier = Silent()
    with pytest.raises(TooManyUnscored, match="the scorer is down"):
        run.search(Search(num_rollouts=8))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_rollouts": 0}, "at least 1 rollout from a state.*num_rollouts=0"),
        ({"strategy": "guess"}, "strategy must be all, adaptive, scan, binary, got 'guess'"),
        ({"best_of": 9}, "best_of=9 needs as many rollouts, num_rollouts is 8"),
        ({"strategy": "binary", "rule": "argmin"}, "rule=argmin needs the values"),
        ({"strategy": "adaptive", "width": 0.3}, "adaptive with width=0.3 saves nothing.*narrower than 0.49"),
        ({"strategy": "adaptive", "num_rollouts": 4}, "saves nothing.*no interval is narrower than 1.00"),
        ({"strategy": "adaptive", "num_rollouts": 14, "width": 0.24}, "saves nothing.*narrower than 0.24"),
        ({"confidence": 1.0}, "need 0 < confidence < 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Search(**settings)


def test_steps_that_do_not_join_to_the_completion_are_refused(run):
    with pytest.raises(StepError, match=r"rollout \w+: .* do not join to the completion"):
        list(solutions(RecordStore(run.folder), RecordStore(run.folder, "verdicts"), "end", TOKENIZER, str.split))


def test_at_most_so_many_solutions_of_a_prompt(run):
    stores = RecordStore(run.folder), RecordStore(run.folder, "verdicts")
    found = list(solutions(*stores, "end", TOKENIZER, split_lines, per_prompt=2))
    assert max(Counter(s.prompt for s in found).values()) == 2
    assert not list(solutions(*stores, "end", TOKENIZER, split_lines, policy="another"))
    both = list(solutions(*stores, "end", TOKENIZER, split_lines, outcomes=("wrong", "correct"), per_prompt=None))
    assert len(both) == 48


# --- Rows for trainers ------------------------------------------------------------------------------------------------


def pairs_of(run, records, **kwargs):
    stores = RecordStore(run.folder), RecordStore(run.folder, "continuations")
    return list(
        pit_pairs(records, stores, RecordStore(run.folder, "verdicts"), "end", TOKENIZER, split_lines, **kwargs)
    )


def test_a_pair_parts_at_the_pit(run):
    records = run.search(Search("binary", num_rollouts=16))
    dropped = Counter()
    pairs = pairs_of(run, records, dropped=dropped)
    assert len(pairs) + sum(dropped.values()) == len(records)
    assert len(pairs) > 10
    for pair in pairs:
        assert "no" not in pair["prefix"]
        assert pair["chosen"].endswith("good")
        assert TOKENIZER.decode(pair["prompt_ids"]) == pair["prompt"] + pair["prefix"]
        assert TOKENIZER.decode(pair["rejected_ids"]) == pair["rejected"]
        assert EOS not in pair["rejected_ids"]
        assert pair["chosen_ids"][-1] == EOS
        a, b = pair["chosen_step"]
        assert TOKENIZER.decode(pair["chosen_ids"][a:b]) == "ok\n"
        assert pair["rejected_step"] == [0, len(pair["rejected_ids"])]
        assert pair["rejected"] != "ok\n"


def test_all_correct_continuations_or_the_shortest(tmp_path):
    run = Run(tmp_path, Chain(luck=0.2))  # some that end well have a `no` in them, which is shorter
    records = run.search(Search("all", num_rollouts=16, threshold=0.3))
    some, every = pairs_of(run, records), pairs_of(run, records, chosen="all")
    assert len(every) > len(some)
    for pair in some:
        rivals = [p for p in every if p["rejected_ids"] == pair["rejected_ids"] and p["prefix"] == pair["prefix"]]
        rivals = [p for p in rivals if p["prompt"] == pair["prompt"]]
        assert len(pair["chosen_ids"]) == min(len(p["chosen_ids"]) for p in rivals)


def test_a_continuation_with_the_same_step_makes_no_pair(run):
    """Blame the step after the true pit's predecessor, `ok`, whose good continuations say the same."""
    records = run.search(Search("all", num_rollouts=16))
    wrong = [{**r, "pit": truth(r) - 1} for r in records if r["pit"] == truth(r) > 1]
    dropped = Counter()
    assert pairs_of(run, wrong, dropped=dropped) == []
    assert dropped["every correct continuation begins with the pit"] == len(wrong) > 3


def test_pairs_whose_steps_hardly_differ_are_left_out_if_wanted(run):
    """`o k` (two tokens) and `no` (one) share the line break: of three tokens two differ."""
    records = run.search(Search("binary", num_rollouts=16))
    dropped = Counter()
    every = pairs_of(run, records)
    assert pairs_of(run, records, min_distance=0.66) == every
    assert pairs_of(run, records, min_distance=0.67, dropped=dropped) == []
    again = Counter()
    assert len(pairs_of(run, records, dropped=again)) == len(every) > 10
    near = dropped["every correct continuation begins too near to the pit"]
    assert near == len(every) + again["duplicate"]


def test_a_pair_that_is_there_already_is_left_out_and_counted(run):
    records = run.search(Search("binary", num_rollouts=16))
    dropped = Counter()
    pairs = pairs_of(run, records, dropped=dropped)
    texts = [(pair["prompt"], pair["prefix"], pair["chosen"], pair["rejected"]) for pair in pairs]
    assert len(set(texts)) == len(texts)
    assert dropped["duplicate"] > 3
    assert pairs_of(run, records + records) == pairs


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("kitten", "sitting", 3 / 7), ("", "", 0), ("", "abc", 1), ("flaw", "lawn", 2 / 4)]
)
def test_edit_distance_of_textbook_words(a, b, distance):
    assert edit_distance([*a.encode()], [*b.encode()]) == edit_distance([*b.encode()], [*a.encode()]) == distance


def test_advantage_rows_carry_ids_steps_and_the_policy_that_drew(run):
    records = run.search(Search("all", num_rollouts=16), outcomes=("wrong", "correct"))
    rows = list(advantage_rows(records))
    assert len(rows) > 20
    for row in rows:
        assert len(row["step_ends"]) == len(row["step_advantages"])
        assert row["step_ends"][-1] == len(row["completion_ids"]) == len(row["behaviour_logps"])
    with pytest.raises(ValueError, match="strategy binary, which gives no values"):
        list(advantage_rows(run.search(Search("binary"), name="b")))
    cut = [{**records[0], "truncated": True, "values": [0.5, *records[0]["values"][1:]]}]
    assert "behaviour_logps" not in next(advantage_rows(cut))


def test_a_state_is_prompt_and_ids():
    state = State("Task?", (), {})
    assert state.request(3).prefix == ""
    assert State("Task?", (7, 8), {}).request(3).prefix == [7, 8]


def credit_of(folder, sampler, verifier=None, n=8):
    return RolloutCredit(sampler, verifier or EndsWith(), PARAMS, search=Search("all", num_rollouts=n), folder=folder)


def judged_once(credit, rewards=(-5.0,)):
    text = "ok\nno\nok\nok\nok\nok\nbad"
    ids = [*TOKENIZER(text, add_special_tokens=False)["input_ids"], EOS]
    steps = token_steps(ids, TOKENIZER, split_lines)
    return credit(
        ["Task 0?"], [text], [steps.texts], prompt_ids=[[5]], completion_ids=[ids], step_ends=[steps.ends],
        rewards=list(rewards), answer=["good"],
    )[0]  # fmt: skip


def test_values_as_step_credit_end_with_what_the_verifier_says(tmp_path):
    """Not with the reward, which may be in another unit."""
    values = judged_once(credit_of(tmp_path, Chain()))
    assert len(values) == 8
    assert values[0] > 0
    assert values[2:] == [0] * 6


def test_step_credit_of_settled_prompts_is_unknown_if_only_live_ones_are_searched(tmp_path):
    credit = RolloutCredit(
        Chain(slip=1.0), EndsWith(), PARAMS, search=Search("all", num_rollouts=4, live_only=True), folder=tmp_path
    )
    values = judged_once(credit)
    assert values[0] == 0
    assert set(values[1:-1]) == {None}


def test_step_credit_of_other_weights_or_another_verifier_is_drawn_and_scored_anew(tmp_path):
    sampler = Chain(slip=0.5)
    credit = credit_of(tmp_path, sampler)
    credit.follows = False
    first = judged_once(credit)
    drawn = credit.drawn
    assert judged_once(credit) == first
    assert credit.drawn == drawn
    sampler.policy, sampler.slip = "better", 0.0
    credit.update(None, "better")
    assert judged_once(credit)[0] == 1 > first[0]
    assert credit.drawn == 2 * drawn

    class Turned(EndsWith):
        def verify(self, prompts, completions, *, answer):
            return super().verify(prompts, completions, answer=["bad"] * len(answer))

    credit.close()
    assert judged_once(credit_of(tmp_path, sampler, Turned()))[0] == 0


def test_prompts_that_are_solved_now_and_then_stay_under_best_of_k(tmp_path):
    """Best of 5 of 8 rollouts, 4 of them correct, is 1; the prompt is not always solved."""
    run = Run(tmp_path, Chain(slip=0.1))
    rows = list(advantage_rows(run.search(Search("all", num_rollouts=6, best_of=5))))
    assert len(rows) > 5

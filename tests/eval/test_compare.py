import math
import warnings

import pytest

from negtune.eval.compare import DO_NOTHING, Arm, EdgeOfSweepWarning, compare
from negtune.records import read_jsonl

BUDGET = {"tokens_sampled": 1000, "gradient_steps": 50}


def peak(at, height=0.5, **budget):
    """An arm's run: the accuracy falls by 0.1 for each factor of 10 off the best rate, and seeds differ by .01."""

    def run(rate, seed):
        return {"accuracy": height - 0.1 * abs(math.log10(rate / at)) + 0.01 * seed, **BUDGET, **budget}

    return run


def nothing(seed):
    return {"accuracy": 0.3 + 0.01 * seed}


def two_arms(**budget):
    return [
        Arm("SFT", peak(1e-3), (1e-4, 1e-3, 1e-2)),
        Arm("NPO", peak(1e-4, 0.6, **budget), (1e-5, 1e-4, 1e-3)),
    ]


def comparison(folder, arms=None, start=nothing, **settings):
    settings = {"seeds": (1, 2, 3), "sweep_seed": 0, "metric": "accuracy", "folder": folder, **settings}
    return compare(two_arms() if arms is None else arms, start, **settings)


def counted(calls, name, run):
    def wrapped(rate, seed):
        calls.append((name, rate, seed))
        return run(rate, seed)

    return wrapped


# --- who wins ---------------------------------------------------------------------------------------------------------


def test_each_arm_is_confirmed_at_its_own_best_rate_on_the_fresh_seeds_only(tmp_path):
    calls = []
    arms = [Arm(arm.name, counted(calls, arm.name, arm.run), arm.rates) for arm in two_arms()]
    found = comparison(tmp_path, arms)
    assert found.rates == {"SFT": 1e-3, "NPO": 1e-4}
    assert calls[:6] == [(arm.name, rate, 0) for arm in arms for rate in arm.rates]
    assert calls[6:] == [(name, rate, seed) for seed in (1, 2, 3) for name, rate in found.rates.items()]
    assert found.values("NPO", "accuracy") == pytest.approx({1: 0.61, 2: 0.62, 3: 0.63})


def test_one_rate_each_is_not_swept(tmp_path):
    calls = []
    arms = [Arm(arm.name, counted(calls, arm.name, arm.run), arm.rates[1:2]) for arm in two_arms()]
    found = comparison(tmp_path, arms)
    assert {seed for _, _, seed in calls} == {1, 2, 3}
    assert found.rates == {"SFT": 1e-3, "NPO": 1e-4}
    assert "Sweep" not in found.markdown()
    assert "chosen on another seed" not in found.markdown()


def test_means_and_paired_differences_by_hand(tmp_path):
    # .61 .62 .63: mean .62, s = .01, half = t(.975, 2) s / sqrt 3 = 4.30265 * .01 / 1.73205 = .024841
    # NPO - nothing at each seed: .3, .3, .3, although both vary over seeds
    found = comparison(tmp_path)
    assert found.interval(found.values("NPO", "accuracy")) == pytest.approx((0.62, 0.0248414), rel=1e-5)
    assert found.interval(found.differences("NPO", "accuracy")) == pytest.approx((0.3, 0.0), abs=1e-12)
    assert found.interval(found.differences("SFT", "accuracy")) == pytest.approx((0.2, 0.0), abs=1e-12)
    assert found.arms == [DO_NOTHING, "SFT", "NPO"]


def test_differences_are_taken_to_the_named_baseline_at_the_same_seed(tmp_path):
    def noisy(rate, seed):
        return {"accuracy": {0: 0.5, 1: 0.1, 2: 0.5, 3: 0.9}[seed], **BUDGET}

    def better_by_seed(rate, seed):
        return {"accuracy": noisy(rate, seed)["accuracy"] + 0.01 * seed, **BUDGET}

    arms = [Arm("plain", noisy, (1.0,)), Arm("ours", better_by_seed, (1.0,))]
    found = comparison(tmp_path, arms, baseline="plain")
    assert found.differences("ours", "accuracy") == pytest.approx({1: 0.01, 2: 0.02, 3: 0.03})
    assert (
        found.interval(found.differences("ours", "accuracy"))[1]
        < 0.1
        < found.interval(found.values("ours", "accuracy"))[1]
    )


def test_lower_is_better_when_asked_for(tmp_path):
    def loss(rate, seed):
        return {"loss": abs(math.log10(rate / 1e-3)) + 1, **BUDGET}

    found = comparison(
        tmp_path, [Arm("SFT", loss, (1e-4, 1e-3, 1e-2))], lambda seed: {"loss": 3.0}, metric="loss", better="lower"
    )
    assert found.rates == {"SFT": 1e-3}
    assert "(lower is better)" in found.markdown()


def test_the_best_rate_and_option_are_chosen_together(tmp_path):
    def scaled(rate, seed, scale):
        return peak({5: 1e-2, 20: 1e-4}[scale], {5: 0.7, 20: 0.6}[scale])(rate, seed)

    rates, options = (1e-4, 1e-3, 1e-2), ({"scale": 5}, {"scale": 20})
    arms = [Arm("ours", scaled, rates, options=options), Arm("plain", peak(1e-3), (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0))]
    with pytest.warns(EdgeOfSweepWarning):
        found = comparison(tmp_path, arms)
    assert (found.rates["ours"], found.options["ours"]) == (1e-2, {"scale": 5})
    assert found.values("ours", "accuracy") == pytest.approx({1: 0.71, 2: 0.72, 3: 0.73})
    assert "ours: the chosen scale 5 is the smallest that was tried; sweep smaller ones too" in found.notes
    text = found.markdown()
    assert "; rates and scale chosen on another seed by" in text
    assert "| ours | 0.01, scale 5 |" in text
    assert "| 0.0001, scale 20: 0.6 |" in text
    assert text.count("**") == 4  # one try of each arm

    def never(rate, seed, scale):
        raise AssertionError("what is on the disk is not run again")

    with pytest.warns(EdgeOfSweepWarning):
        again = comparison(tmp_path, [Arm("ours", never, rates, options=options), arms[1]])
    assert (again.rates, again.options) == (found.rates, found.options)
    assert again.values("ours", "accuracy") == found.values("ours", "accuracy")


def test_options_are_not_swept_where_there_is_one(tmp_path):
    arm = Arm(
        "ours", lambda rate, seed, scale: {"accuracy": scale / 10 + seed, **BUDGET}, (1.0,), options=({"scale": 5},)
    )
    found = comparison(tmp_path, [arm])
    assert found.sweep == []
    assert found.values("ours", "accuracy") == {1: 1.5, 2: 2.5, 3: 3.5}


def test_of_equally_good_rates_the_smallest_is_taken(tmp_path):
    flat = Arm("flat", lambda rate, seed: {"accuracy": 0.5, **BUDGET}, (1e-2, 1e-4, 1e-3))
    with pytest.warns(EdgeOfSweepWarning):
        assert comparison(tmp_path, [flat]).rates == {"flat": 1e-4}


# --- fairness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": []}, "need arms"),
        ({"arms": [Arm("a", peak(1), (1.0,)), Arm("a", peak(1), (1.0,))]}, "different names"),
        ({"arms": [Arm(DO_NOTHING, peak(1), (1.0,))]}, "'do nothing' is taken"),
        ({"arms": [Arm("a", peak(1), (1.0, 2.0)), Arm("b", peak(1), (1.0,))]}, r"same number of tries.*'a': 2, 'b': 1"),
        (
            {"arms": [Arm("a", peak(1), (1.0, 2.0)), Arm("b", peak(1), (1.0, 2.0), options=({"x": 1}, {"x": 2}))]},
            r"same number of tries.*'a': 2, 'b': 4",
        ),
        ({"arms": [Arm("a", peak(1), (1.0,), options=({"x": 1}, {"x": 1}))]}, "options must be different"),
        ({"arms": [Arm("a", peak(1), ())]}, "same number of tries"),
        ({"arms": [Arm("a", peak(1), (1.0, 1.0))]}, r"different and above 0, got \[1.0, 1.0\] for a"),
        ({"arms": [Arm("a", peak(1), (0.0, 1.0))]}, "above 0"),
        ({"seeds": (1,)}, "at least 2 seeds"),
        ({"seeds": (1, 2, 2)}, "all different"),
        ({"seeds": (0, 1)}, "must not hold sweep_seed=0"),
        ({"better": "bigger"}, "higher or lower, got 'bigger'"),
        ({"baseline": "DPO"}, "baseline must be one of .*'NPO'.*got 'DPO'"),
    ],
)
def test_an_unfair_comparison_is_refused_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        comparison(tmp_path / "none", **changes)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", [*BUDGET, "accuracy"])
def test_a_run_that_does_not_count_what_it_spends_is_refused(tmp_path, name):
    def run(rate, seed):
        return {key: value for key, value in peak(1)(rate, seed).items() if key != name}

    with pytest.raises(ValueError, match=f"a run of a returned no {name}"):
        comparison(tmp_path, [Arm("a", run, (1.0, 2.0))])
    assert not (tmp_path / "runs.jsonl").exists()


def test_an_arm_with_other_settings_runs_again_and_the_others_do_not(tmp_path):
    ran = []
    for beta in (0.1, 0.5, 0.1):
        calls: list[tuple] = []
        given = {"a": {"beta": beta}, "b": {}}
        comparison(tmp_path, [Arm(name, counted(calls, name, peak(1)), (1.0,), given[name]) for name in given])
        ran.append({name for name, _, _ in calls})
    assert ran == [{"a", "b"}, {"a"}, set()]


def test_unequal_budgets_are_named_in_the_table_and_equal_ones_are_not(tmp_path):
    assert comparison(tmp_path / "equal").notes == []
    assert comparison(tmp_path / "nearly", two_arms(tokens_sampled=1050)).notes == []
    found = comparison(tmp_path / "unequal", two_arms(tokens_sampled=1051, gradient_steps=40))
    assert found.notes == [
        "unequal budgets: tokens_sampled differ by more than 5%: SFT 1,000, NPO 1,051",
        "unequal budgets: gradient_steps differ by more than 5%: SFT 50, NPO 40",
    ]
    assert all(note in found.markdown() for note in found.notes)
    assert comparison(tmp_path / "unequal", two_arms(), budget_tolerance=0.3).notes == []


def test_an_arm_that_samples_nothing_beside_one_that_does_is_unequal(tmp_path):
    assert len(comparison(tmp_path, two_arms(tokens_sampled=0)).notes) == 1


@pytest.mark.parametrize(("at", "end"), [(1e-5, "1e-05 is the smallest"), (1e-1, "0.001 is the largest")])
def test_a_best_rate_at_the_edge_of_the_sweep_is_warned_of(tmp_path, at, end):
    arms = [Arm("NPO", peak(at), (1e-3, 1e-5, 1e-4))]
    with pytest.warns(EdgeOfSweepWarning, match=end):
        assert end in comparison(tmp_path, arms).markdown()


def test_a_best_rate_inside_the_sweep_is_not(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison(tmp_path)


def test_one_rate_for_each_arm_has_no_edges(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert comparison(tmp_path, [Arm("a", peak(1), (1.0,))]).notes == []


# --- divergence -------------------------------------------------------------------------------------------------------


def diverging(where, value=math.nan):
    def run(rate, seed):
        if (rate, seed) in where:
            return {"accuracy": value, "tokens_sampled": 7}  # it ended early, and did not count everything
        return {"length": 10.0, **peak(1e-4)(rate, seed)}

    return run


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("better", ["higher", "lower"])
def test_a_rate_that_diverged_in_the_sweep_is_never_chosen(tmp_path, better, value):
    arms = [Arm("NPO", diverging({(1e-4, 0), (1e-3, 0)}, value), (1e-3, 1e-4, 1e-5))]
    with pytest.warns(EdgeOfSweepWarning):
        assert comparison(tmp_path, arms, better=better).rates == {"NPO": 1e-5}


def test_a_seed_that_diverged_counts_as_the_worst_not_as_missing(tmp_path):
    arms = [Arm("NPO", diverging({(1e-4, 2)}), (1e-5, 1e-4, 1e-3))]
    found = comparison(tmp_path, arms, worst=0.0)
    assert found.values("NPO", "accuracy") == pytest.approx({1: 0.51, 2: 0.0, 3: 0.53})
    assert found.differences("NPO", "accuracy")[2] == pytest.approx(-0.32)
    assert found.notes == ["NPO: diverged on seed 2, counted as 0"]
    assert "NaN on 1 of 3 seeds" in found.markdown()  # the length, for which nothing is known to be the worst


def test_without_a_worst_value_an_arm_that_diverged_gets_no_number(tmp_path):
    arms = [Arm("NPO", diverging({(1e-4, 2)}), (1e-5, 1e-4, 1e-3))]
    found = comparison(tmp_path, arms)
    assert all(map(math.isnan, found.interval(found.values("NPO", "accuracy"))))
    assert found.notes == ["NPO: diverged on seed 2"]
    assert "| NPO | 0.0001 | NaN on 1 of 3 seeds |" in found.markdown()


def test_what_a_run_spent_before_it_diverged_does_not_make_budgets_unequal(tmp_path):
    arms = [two_arms()[0], Arm("NPO", diverging({(1e-4, 2)}), (1e-5, 1e-4, 1e-3))]
    assert comparison(tmp_path, arms).notes == ["NPO: diverged on seed 2"]


def test_an_error_in_a_run_is_no_divergence(tmp_path):
    def broken(rate, seed):
        raise KeyError("typo")

    with pytest.raises(KeyError, match="typo"):
        comparison(tmp_path, [Arm("a", broken, (1.0,))])


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_a_killed_comparison_goes_on_where_it_was(tmp_path):
    class Killed(BaseException):
        pass

    calls, whole = [], comparison(tmp_path / "whole")

    def killed_on_the_eighth(run):
        def wrapped(rate, seed):
            if len(calls) == 8:
                raise Killed
            calls.append((rate, seed))
            return run(rate, seed)

        return wrapped

    with pytest.raises(Killed):
        comparison(tmp_path / "killed", [Arm(a.name, killed_on_the_eighth(a.run), a.rates) for a in two_arms()])
    again = []
    found = comparison(tmp_path / "killed", [Arm(a.name, counted(again, a.name, a.run), a.rates) for a in two_arms()])
    assert len(again) == 12 - 8
    assert found.markdown() == whole.markdown()
    assert len(read_jsonl(tmp_path / "killed" / "runs.jsonl")) == 12 + 3


def test_a_finished_comparison_runs_nothing_again_and_a_diverged_run_stays_diverged(tmp_path):
    where = {(1e-4, 2), (1e-3, 0)}
    arms = [Arm("NPO", diverging(where), (1e-5, 1e-4, 1e-3))]
    calls, first = [], comparison(tmp_path, arms).markdown()
    again = [Arm("NPO", counted(calls, "NPO", diverging(set())), (1e-5, 1e-4, 1e-3))]
    assert comparison(tmp_path, again).markdown() == first
    assert calls == []


def test_runs_of_other_settings_are_not_used_and_stay_in_the_file(tmp_path):
    calls = []
    arms = [Arm("a", counted(calls, "a", peak(1)), (1.0, 2.0))]
    for rows, expected in ((100, 5), (200, 10), (100, 10)):
        comparison(tmp_path, arms, settings={"rows": rows, "sizes": (1, 2)})
        assert len(calls) == expected


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_whole_table_by_hand(tmp_path):
    def with_length(rate, seed):
        return {"length": 20.0 + seed, **peak(1e-3)(rate, seed)}

    arms = [Arm("SFT", with_length, (1e-4, 1e-3, 1e-2)), two_arms()[1]]

    def start(seed):
        return {"length": 18.0 + seed, **nothing(seed)}

    assert comparison(tmp_path, arms, start, baseline="SFT").markdown() == (
        "Mean ± 95% Student t interval over 3 seeds (1, 2, 3); rates chosen on another seed by `accuracy` "
        "(higher is better).\n"
        "\n"
        "| arm | rate | accuracy | length | tokens_sampled | gradient_steps |\n"
        "|---|---|---|---|---|---|\n"
        "| do nothing | – | 0.320 ± 0.025 | 20.0 ± 2.5 | – | – |\n"
        "| SFT | 0.001 | 0.520 ± 0.025 | 22.0 ± 2.5 | 1,000 ± 0 | 50 ± 0 |\n"
        "| NPO | 0.0001 | 0.620 ± 0.025 | – | 1,000 ± 0 | 50 ± 0 |\n"
        "\n"
        "Paired difference to SFT, seed by seed:\n"
        "\n"
        "| arm | accuracy | length |\n"
        "|---|---|---|\n"
        "| do nothing | -0.2 ± 0 | -2 ± 0 |\n"
        "| NPO | +0.1 ± 0 | – |\n"
        "\n"
        "Sweep of `accuracy`, one seed, the chosen try in bold:\n"
        "\n"
        "| arm | try 1 | try 2 | try 3 |\n"
        "|---|---|---|---|\n"
        "| SFT | 0.0001: 0.4 | **0.001: 0.5** | 0.01: 0.4 |\n"
        "| NPO | 1e-05: 0.5 | **0.0001: 0.6** | 0.001: 0.5 |\n"
    )


def test_runs_side_by_side_are_the_same_runs(tmp_path):
    def run(rate, seed):
        return {"accuracy": rate * 10 + seed / 100, "tokens_sampled": 5, "gradient_steps": 2}

    def found(folder, workers):
        arms = [Arm("a", run, (0.01, 0.02, 0.03)), Arm("b", run, (0.01, 0.02, 0.05))]
        return compare(
            arms, lambda seed: {"accuracy": 0.1}, seeds=(1, 2), sweep_seed=0, metric="accuracy", folder=folder,
            workers=workers,
        )  # fmt: skip

    with pytest.warns(EdgeOfSweepWarning):
        one, three = found(tmp_path / "one", 1), found(tmp_path / "three", 3)
    assert three == one
    assert len((tmp_path / "three" / "runs.jsonl").read_text().splitlines()) == 12


def test_a_run_that_fails_side_by_side_says_why(tmp_path):
    def run(rate, seed):
        if rate == 0.02:
            raise OSError("no more disk")
        return {"accuracy": rate, "tokens_sampled": 5, "gradient_steps": 2}

    with pytest.raises(RuntimeError, match="a run of a failed(.|\n)*no more disk"):
        compare(
            [Arm("a", run, (0.01, 0.02, 0.03))], lambda seed: {"accuracy": 0.1}, seeds=(1, 2), sweep_seed=0,
            metric="accuracy", folder=tmp_path, workers=2,
        )  # fmt: skip

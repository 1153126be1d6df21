"""Arms x learning rates x seeds -> one table with intervals, fair by construction.

1. Sweep: every arm runs at as many rates as every other, on one seed, each rate with each of its options (a scale, a
   beta). Its best try goes on. (None with one try each.)
2. Confirmation: that try on fresh seeds, the same for all arms. Only these runs enter the table, so that the choice
   does not flatter an arm.

Doing nothing is measured on the same seeds. What a run spends is counted and compared, not trusted. Every finished run
is a line of `runs.jsonl`: a comparison that was killed goes on where it was.

    arms = [Arm("SFT", sft, (1e-4, 3e-4, 1e-3)), Arm("NPO", npo, (1e-5, 3e-5, 1e-4))]
    found = compare(arms, start, seeds=(1, 2, 3), sweep_seed=0, metric="accuracy", folder="runs/npo", baseline="SFT")
    print(found.markdown())
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from negtune.metrics.stats import mean_interval
from negtune.records import append_jsonl, read_jsonl, strict

BUDGETS = ("tokens_sampled", "gradient_steps")
"""What a run spends, counted by the run itself: part of the metrics of every run."""
DO_NOTHING = "do nothing"

logger = logging.getLogger(__name__)


class EdgeOfSweepWarning(UserWarning):
    """An arm was best at an end of its rates: a rate outside may be better still."""


@dataclass(frozen=True)
class Arm:
    """One way to train, and the rates it is tried at.

    Args:
        name: in the table.
        run: `(rate, seed, **option) -> metrics` of one run, `tokens_sampled` and `gradient_steps` among them. NaN (or
            infinity) as the compared metric says that it diverged. An exception ends the comparison.
        rates: learning rates to sweep, above 0.
        options: settings to sweep beside the rate, each with every rate: `[{"scale": 5}, {"scale": 20}]`.
        settings: whatever else decides a result of this arm alone; its runs with others in the folder are not used.
    """

    name: str
    run: Callable[..., Mapping[str, float]]
    rates: Sequence[float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Sequence[Mapping[str, Any]] = ({},)

    @property
    def tries(self) -> list[tuple[float, Mapping[str, Any]]]:
        """Every rate with every option."""
        return [(rate, option) for option in self.options for rate in self.rates]


@dataclass(frozen=True)
class Finished:
    """One run that ended, as a line of `runs.jsonl`.

    Args:
        arm: its name.
        stage: `sweep` or `confirm`.
        rate: learning rate; 0 for doing nothing.
        seed: of the run.
        settings: those of `compare`, and under `arm` those of the arm, if it has any.
        metrics: what the run returned; not-finite numbers are NaN.
        seconds: it took.
        option: what was swept beside the rate.
    """

    arm: str
    stage: str
    rate: float
    seed: int
    settings: Mapping[str, Any]
    metrics: Mapping[str, float]
    seconds: float = field(default=0.0, compare=False)
    option: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Finished:
        """From a line of the file, where NaN is null."""
        metrics = {name: math.nan if value is None else value for name, value in record["metrics"].items()}
        return cls(**{**record, "metrics": metrics})

    def value(self, name: str) -> float:
        """A metric; NaN if the run has none of this name."""
        return self.metrics.get(name, math.nan)


@dataclass(frozen=True)
class Comparison:
    """What was found. Arms are in the order given, doing nothing first.

    Args:
        metric: the rates were chosen by it.
        better: `higher` or `lower`.
        baseline: arm that the others are compared with.
        rates: arm to its chosen rate.
        options: arm to its chosen option.
        sweep: every run of the sweep.
        confirmed: every run on a fresh seed.
        worst: what `metric` counts as in a run that diverged.
        confidence: of the intervals.
        notes: what a reader must know before believing the table: unequal budgets, edges of the sweep, divergence.
    """

    metric: str
    better: str
    baseline: str
    rates: dict[str, float]
    sweep: list[Finished]
    confirmed: list[Finished]
    worst: float | None
    confidence: float
    notes: list[str] = field(default_factory=list)
    options: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """Names of all arms, doing nothing first."""
        return [DO_NOTHING, *self.rates]

    def values(self, arm: str, name: str) -> dict[int, float]:
        """Seed to metric of the confirmed runs: NaN where a run has none, `worst` where it diverged.

        Empty if no run of the arm has a metric of this name.
        """
        runs = [run for run in self.confirmed if run.arm == arm]
        if not any(name in run.metrics for run in runs):
            return {}
        diverged = math.nan if self.worst is None or name != self.metric else self.worst
        return {run.seed: diverged if math.isnan(run.value(name)) else run.value(name) for run in runs}

    def differences(self, arm: str, name: str) -> dict[int, float]:
        """Seed to metric of `arm` minus that of the baseline at the same seed."""
        ours, theirs = self.values(arm, name), self.values(self.baseline, name)
        return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}

    def interval(self, values: Mapping[int, float]) -> tuple[float, float]:
        """Mean and half-width of the Student t interval; NaN twice if a value is NaN: never a mean of the survivors."""
        if any(map(math.isnan, values.values())):
            return math.nan, math.nan
        return mean_interval(list(values.values()), confidence=self.confidence)

    def markdown(self) -> str:
        """Notes, and three tables: means, paired differences to the baseline, the sweep."""
        seeds = sorted({run.seed for run in self.confirmed})
        about = (
            f"Mean ± {self.confidence:.0%} Student t interval over {len(seeds)} seeds ({', '.join(map(str, seeds))})"
        )
        swept = " and ".join(["rates", *sorted({name for run in self.sweep for name in run.option})])
        about += (
            f"; {swept} chosen on another seed by `{self.metric}` ({self.better} is better)." if self.sweep else "."
        )
        notes = ["\n".join(f"- {note}" for note in self.notes)] if self.notes else []
        blocks = [about, *notes, _means(self), f"Paired difference to {self.baseline}, seed by seed:"]
        blocks += [_differences(self)]
        if self.sweep:
            blocks += [f"Sweep of `{self.metric}`, one seed, the chosen try in bold:", _sweep(self)]
        return "\n\n".join(blocks) + "\n"


def compare(
    arms: Sequence[Arm],
    do_nothing: Callable[[int], Mapping[str, float]],
    *,
    seeds: Sequence[int],
    sweep_seed: int,
    metric: str,
    folder: str | Path,
    better: str = "higher",
    baseline: str = DO_NOTHING,
    settings: Mapping[str, Any] | None = None,
    worst: float | None = None,
    budget_tolerance: float = 0.05,
    confidence: float = 0.95,
    workers: int = 1,
) -> Comparison:
    """Run every arm, or take what `folder` holds of it, and compare.

    Args:
        arms: each with the same number of tries.
        do_nothing: `seed -> metrics` of the untrained start, measured as the arms measure; no budgets needed.
        seeds: of the confirmation, two or more.
        sweep_seed: of the sweep, none of `seeds`. Nothing is swept where every arm has one try.
        metric: chooses the rates. To choose them on other rows than the table shows, let a run return both.
        folder: of `runs.jsonl`, created if missing.
        better: `higher` or `lower`.
        baseline: name of the arm that differences are taken to.
        settings: whatever else decides a result (model, data, sizes); runs of other settings in the folder are not
            used, and stay there.
        worst: what `metric` counts as in a run that diverged, 0 for an accuracy. None: the table gives no number for an
            arm with such a run.
        budget_tolerance: budgets of two arms agree if the larger mean is at most this share above the smaller.
        confidence: chance that an interval covers the true mean if the numbers are normal.
        workers: runs side by side, in forked processes; what they share has to be on the disk before.

    Raises:
        ValueError: a comparison that would not be fair, before anything runs; a run without its metric or its budgets.
    """
    _check(arms, seeds, sweep_seed, better, baseline)
    runner = _Runner(Path(folder), strict(settings or {}), metric)
    chosen, sweep = {arm.name: arm.tries[0] for arm in arms}, []
    if len(arms[0].tries) > 1:
        tries = [
            Job(arm.name, "sweep", rate, sweep_seed, arm.run, arm.settings, option)
            for arm in arms
            for rate, option in arm.tries
        ]
        sweep = runner.run_all(tries, workers)
        chosen = {arm.name: _best_try([run for run in sweep if run.arm == arm.name], metric, better) for arm in arms}
    jobs = []
    for seed in seeds:  # one seed of all arms after the other: a comparison that is stopped early is still a fair one
        jobs.append(Job(DO_NOTHING, "confirm", 0.0, seed, lambda rate, seed: do_nothing(seed)))
        for arm in arms:
            rate, option = chosen[arm.name]
            jobs.append(Job(arm.name, "confirm", rate, seed, arm.run, arm.settings, option))
    confirmed = runner.run_all(jobs, workers)
    rates = {name: rate for name, (rate, _) in chosen.items()}
    options = {name: option for name, (_, option) in chosen.items()}
    found = Comparison(metric, better, baseline, rates, sweep, confirmed, worst, confidence, options=options)
    edges = list(_edge_notes(found))
    for note in edges:
        warnings.warn(note, EdgeOfSweepWarning, stacklevel=2)
    return replace(found, notes=[*edges, *_divergence_notes(found), *_budget_notes(found, budget_tolerance)])


def _check(arms: Sequence[Arm], seeds: Sequence[int], sweep_seed: int, better: str, baseline: str) -> None:
    """Raise ValueError for a comparison that would not be fair, or not be readable."""
    names, counts = [DO_NOTHING, *(arm.name for arm in arms)], {arm.name: len(arm.tries) for arm in arms}
    twice = [name for name, count in Counter(names).items() if count > 1]
    if not arms or twice:
        raise ValueError(f"need arms of different names, got {names}; {DO_NOTHING!r} is taken")
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ValueError(f"every arm needs the same number of tries (rates x options), got {counts}")
    for arm in arms:
        if len(set(arm.rates)) < len(arm.rates) or min(arm.rates) <= 0:
            raise ValueError(f"rates must be different and above 0, got {list(arm.rates)} for {arm.name}")
        if any(option in list(arm.options)[:i] for i, option in enumerate(arm.options)):
            raise ValueError(f"options must be different, got {list(arm.options)} for {arm.name}")
    if len(set(seeds)) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError(f"an interval needs at least 2 seeds, all different, got {list(seeds)}")
    if sweep_seed in seeds:
        raise ValueError(f"seeds {list(seeds)} must not hold sweep_seed={sweep_seed}: the rates are chosen on it")
    if better not in ("higher", "lower"):
        raise ValueError(f"better must be higher or lower, got {better!r}")
    if baseline not in names:
        raise ValueError(f"baseline must be one of {names}, got {baseline!r}")


@dataclass(frozen=True)
class Job:
    """One run to make: the fields of `Finished`, and the function."""

    arm: str
    stage: str
    rate: float
    seed: int
    run: Callable[..., Mapping[str, float]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    option: Mapping[str, Any] = field(default_factory=dict)


class _Runner:
    """Runs what the file does not hold, and appends it there."""

    def __init__(self, folder: Path, settings: dict[str, Any], metric: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.settings, self.metric = folder / "runs.jsonl", settings, metric
        records = read_jsonl(self.path) if self.path.exists() else []
        self.done = list(map(Finished.from_record, records))

    def run_all(self, jobs: Sequence[Job], workers: int) -> list[Finished]:
        """All of them, in order. What one run returns is on the disk before the next begins, or as soon as it ends."""
        missing = [job for job in jobs if self._known(job) is None]
        if workers > 1 and len(missing) > 1:
            self._run_side_by_side(missing, workers)
        return [self._known(job) or self._keep(self._make(job)) for job in jobs]

    def _run_side_by_side(self, jobs: list[Job], workers: int) -> None:
        context = multiprocessing.get_context("fork")  # arms are closures, which no other start method takes along
        results = context.SimpleQueue()
        waiting, running = list(enumerate(jobs)), {}
        while waiting or running:
            while waiting and len(running) < workers:
                number, job = waiting.pop(0)
                running[number] = context.Process(target=self._work, args=(number, job, results))
                running[number].start()
            number, run, trace = results.get()
            running.pop(number).join()
            if run is None:
                for process in running.values():
                    process.terminate()
                raise RuntimeError(f"a run of {jobs[number].arm} failed:\n{trace}")
            self._keep(run)

    def _work(self, number: int, job: Job, results: Any) -> None:
        try:
            results.put((number, self._make(job), ""))
        except Exception:
            results.put((number, None, traceback.format_exc()))

    def _known(self, job: Job) -> Finished | None:
        wanted = job.arm, job.rate, strict(job.option), job.seed, self._settings(job)
        known = (run for run in self.done if (run.arm, run.rate, run.option, run.seed, run.settings) == wanted)
        return next(known, None)

    def _settings(self, job: Job) -> dict[str, Any]:
        return {**self.settings, **({"arm": strict(job.settings)} if job.settings else {})}

    def _make(self, job: Job) -> Finished:
        logger.info("%s: %s, %s, seed %d", job.stage, job.arm, _try(job.rate, job.option), job.seed)
        start = time.perf_counter()
        metrics = {name: float(value) for name, value in job.run(job.rate, job.seed, **job.option).items()}
        metrics = {name: value if math.isfinite(value) else math.nan for name, value in metrics.items()}
        seconds = round(time.perf_counter() - start, 2)
        settings, option = self._settings(job), strict(job.option)
        run = Finished(job.arm, job.stage, job.rate, job.seed, settings, metrics, seconds, option)
        _check_metrics(run, self.metric)
        return run

    def _keep(self, run: Finished) -> Finished:
        append_jsonl(self.path, [run])
        self.done.append(run)
        return run


def _check_metrics(run: Finished, metric: str) -> None:
    needed = [metric] if run.arm == DO_NOTHING or math.isnan(run.value(metric)) else [metric, *BUDGETS]
    missing = [name for name in needed if name not in run.metrics]
    if missing:
        raise ValueError(
            f"a run of {run.arm} returned no {' and no '.join(missing)}, only {sorted(run.metrics)}; every run counts "
            "what it spends, 0 if nothing"
        )


def _best_try(sweep: Sequence[Finished], metric: str, better: str) -> tuple[float, Mapping[str, Any]]:
    """Rate and option of the best run; of equally good ones that of the smallest rate, and the first option.

    A run that diverged is worse than all others.
    """
    sign = 1 if better == "higher" else -1

    def goodness(run: Finished) -> tuple[float, float]:
        value = run.value(metric)
        return (-math.inf if math.isnan(value) else sign * value), -run.rate

    best = max(sweep, key=goodness)
    return best.rate, best.option


def _edge_notes(found: Comparison) -> Iterator[str]:
    for arm, rate in found.rates.items():
        runs = [run for run in found.sweep if run.arm == arm]
        numbers = {"rate": (rate, [run.rate for run in runs])}
        for name, value in found.options.get(arm, {}).items():
            tried = [run.option.get(name) for run in runs]
            if all(isinstance(one, int | float) and not isinstance(one, bool) for one in tried):
                numbers[name] = value, tried
        for name, (value, tried) in numbers.items():
            low, high = min(tried, default=value), max(tried, default=value)
            if low < high and value in (low, high):
                end, way = ("largest", "larger") if value == high else ("smallest", "smaller")
                yield f"{arm}: the chosen {name} {value:g} is the {end} that was tried; sweep {way} ones too"


def _divergence_notes(found: Comparison) -> Iterator[str]:
    for arm in found.arms:
        seeds = [str(r.seed) for r in found.confirmed if r.arm == arm and math.isnan(r.value(found.metric))]
        if seeds:
            counted = "" if found.worst is None else f", counted as {found.worst:g}"
            yield f"{arm}: diverged on seed {', '.join(seeds)}{counted}"


def _budget_notes(found: Comparison, tolerance: float) -> Iterator[str]:
    """What two arms spent unequally. Runs that diverged are left out: they may have ended early."""
    for name in BUDGETS:
        means = {}
        for arm in found.rates:
            ended = [run for run in found.confirmed if run.arm == arm and not math.isnan(run.value(found.metric))]
            spent = [run.value(name) for run in ended]
            means |= {arm: sum(spent) / len(spent)} if spent else {}
        if means and max(means.values()) > (1 + tolerance) * min(means.values()):
            listed = ", ".join(f"{arm} {mean:,.0f}" for arm, mean in means.items())
            yield f"unequal budgets: {name} differ by more than {tolerance:.0%}: {listed}"


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _means(found: Comparison) -> str:
    names, lines = _names(found), []
    for arm in found.arms:
        rate = _try(found.rates[arm], found.options.get(arm, {})) if arm in found.rates else "–"
        lines.append([arm, rate, *(_cell(found, found.values(arm, name)) for name in names)])
    return _table(["arm", "rate", *names], lines)


def _differences(found: Comparison) -> str:
    names = [name for name in _names(found) if name not in BUDGETS]
    others = [arm for arm in found.arms if arm != found.baseline]
    lines = [[arm, *(_cell(found, found.differences(arm, name), sign="+") for name in names)] for arm in others]
    return _table(["arm", *names], lines)


def _sweep(found: Comparison) -> str:
    lines = []
    for arm, best in found.rates.items():
        cells, option = [], found.options.get(arm, {})
        for run in (run for run in found.sweep if run.arm == arm):
            value = run.value(found.metric)
            text = f"{_try(run.rate, run.option)}: {'diverged' if math.isnan(value) else f'{value:.4g}'}"
            cells.append(f"**{text}**" if (run.rate, run.option) == (best, option) else text)
        lines.append([arm, *cells])
    return _table(["arm", *(f"try {i + 1}" for i in range(len(lines[0]) - 1))], lines)


def _try(rate: float, option: Mapping[str, Any]) -> str:
    """`0.01, scale 5`."""
    values = {name: f"{value:g}" if isinstance(value, float) else value for name, value in option.items()}
    return ", ".join([f"{rate:g}", *(f"{name} {value}" for name, value in values.items())])


def _names(found: Comparison) -> list[str]:
    """Metrics that any confirmed run has: the compared one first, budgets last."""
    names = dict.fromkeys([found.metric, *(name for run in found.confirmed for name in run.metrics)])
    return [*(name for name in names if name not in BUDGETS), *(name for name in BUDGETS if name in names)]


def _cell(found: Comparison, values: Mapping[int, float], sign: str = "") -> str:
    """`0.412 ± 0.031`: the half-width with two digits, the mean with as many decimals."""
    if not values:
        return "–"
    missing = sum(map(math.isnan, values.values()))
    if missing:
        return f"NaN on {missing} of {len(values)} seeds"
    mean, half = found.interval(values)
    if half <= 1e-9 * abs(mean):  # equal but for rounding
        return f"{mean:{sign},.4g} ± 0" if abs(mean) < 1e4 else f"{mean:{sign},.0f} ± 0"
    decimals = max(0, 1 - math.floor(math.log10(half)))
    return f"{mean:{sign},.{decimals}f} ± {half:,.{decimals}f}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(cells)} |" for cells in [head, *lines]]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])

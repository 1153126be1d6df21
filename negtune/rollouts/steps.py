"""Where a solution went wrong, found by letting the model go on from its prefixes.

State i of a solution is its prompt and its first i steps (`credit`, `states`). Four ways to look for the first pit,
from the most rollouts to the fewest:

all       the same number from every state: values and advantages of all steps besides
adaptive  from every state until the interval of its value is narrow enough: values too, most where they are uncertain
scan      state after state from the front until one is dead
binary    bisection between the prompt, which is alive, and the wrong end, which is dead: about log2(steps) states

Only `all` gives unbiased values. `adaptive` stops where a value looks certain, which pulls it to the near end (with the
defaults .8 is .84 on average, .2 is .16). The last two stop at a state as soon as it is known to be alive or dead; they
look no further than the bare prompt where it is always or never solved.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from negtune.credit import Pit, PitRule, Tally, best_of, first_pit, state_values, step_advantages
from negtune.data.steps import TokenSteps
from negtune.metrics.verification import wilson
from negtune.records import strict
from negtune.rollouts.collect import Progress, in_parts
from negtune.rollouts.sampler import Sampler, SamplingParams, share_of
from negtune.rollouts.states import Solution, StateRollouts
from negtune.rollouts.store import RecordStore
from negtune.verifiers.verdict import Verifier, fingerprint

Strategy = Literal["all", "adaptive", "scan", "binary"]
Steps = Generator[dict[int, int], dict[int, Tally], None]
"""A search: asks for so many rollouts in all from each of these states, is sent their tallies, and so on."""


@dataclass(frozen=True)
class Search:
    """How the states of a solution are explored.

    Args:
        strategy: see the module.
        num_rollouts: from one state, at most; from the bare prompt and under `all`, exactly.
        batch: rollouts added to a state at a time by the other strategies.
        width: adaptive: of the interval at which a value is known well enough. By default 4 rollouts that end alike
            are enough, 4 that do not are too few.
        confidence: of the intervals (Wilson).
        threshold: a state with at most this value is dead.
        rule: which step is the pit, under `all` and `adaptive`; the others look for the first dead state.
        best_of: values are those under best-of-k (unbiased) for the rules `argmin` and `largest_drop`, and for the
            advantages; the paper's 5. At most `num_rollouts`; 1 under the strategies without values.
        live_only: under `all` and `adaptive` look at the bare prompt first, and at nothing else where every rollout of
            it ends alike: such solutions make neither pairs nor rows, but their values stay unknown. (The others never
            look further there.)
    """

    strategy: Strategy = "all"
    num_rollouts: int = 8
    batch: int = 4
    width: float = 0.5
    confidence: float = 0.95
    threshold: float = 0.0
    rule: PitRule = "all_fail"
    best_of: int = 1
    live_only: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in _STRATEGIES:
            raise ValueError(f"strategy must be {', '.join(_STRATEGIES)}, got {self.strategy!r}")
        if self.num_rollouts < 1 or self.batch < 1:
            raise ValueError(
                f"need at least 1 rollout from a state, and 1 at a time, got num_rollouts={self.num_rollouts}, "
                f"batch={self.batch}"
            )
        if not 1 <= self.best_of <= self.num_rollouts:
            raise ValueError(f"best_of={self.best_of} needs as many rollouts, num_rollouts is {self.num_rollouts}")
        if not 0 < self.confidence < 1 or not 0 < self.width <= 1 or not 0 <= self.threshold < 1:
            raise ValueError(
                f"need 0 < confidence < 1, 0 < width <= 1 and 0 <= threshold < 1, got confidence={self.confidence}, "
                f"width={self.width}, threshold={self.threshold}"
            )
        if self.strategy == "adaptive" and self._narrowest() > self.width:
            raise ValueError(
                f"adaptive with width={self.width} saves nothing: before num_rollouts={self.num_rollouts} is reached, "
                f"{self.batch} at a time, no interval is narrower than {self._narrowest():.2f}; raise width or "
                "num_rollouts, or use strategy all"
            )
        if (self.rule != "all_fail" or self.best_of > 1) and not self.gives_values:
            said = f"rule={self.rule}" if self.rule != "all_fail" else f"best_of={self.best_of}"
            raise ValueError(f"{said} needs the values of all states; use strategy all or adaptive")

    def _narrowest(self) -> float:
        """Width of the narrowest interval that adaptive can see before a state has all its rollouts."""
        first = max(self.batch, self.best_of)
        if first >= self.num_rollouts:
            return 1.0
        rate = wilson(0, first + (self.num_rollouts - 1 - first) // self.batch * self.batch, confidence=self.confidence)
        return rate.high - rate.low

    @property
    def gives_values(self) -> bool:
        """Whether counts are those of values, and not stopped at what settles dead or alive."""
        return self.strategy in ("all", "adaptive")


def locate(
    store: RecordStore,
    found: Iterable[Solution],
    rollouts: StateRollouts,
    search: Search,
    *,
    part: int = 64,
    process_index: int = 0,
    processes: int = 1,
    progress: Progress | None = None,
) -> Counter[str]:
    """Search every solution that `store` does not have; one record each. Returns how many ended for which reason.

    Args:
        store: gets `judgement` records; see there.
        found: solutions.
        rollouts: where rollouts come from.
        search: how.
        part: solutions that are searched side by side, and written together.
        process_index, processes: this process takes its share of the prompts: solutions of one prompt have states in
            common, which no two processes draw.
        progress: told after every part: solutions done, of how many, and tokens drawn.

    Raises:
        ValueError: `store` has been searched with other settings.
    """
    mine = _share(list(found), process_index, processes)
    missing = [solution for solution in mine if _key(solution, search) not in store]
    _refuse_other_search(store, search, rollouts.context(), {solution.key: solution.steps.ends for solution in mine})
    keys = {_key(solution, search) for solution in mine}
    reasons: Counter[str] = Counter(record["reason"] for record in store if record["key"] in keys)
    done = len(mine) - len(missing)
    for some in in_parts(missing, part):
        before = rollouts.drawn_tokens
        tallies = _explore(some, rollouts, search)
        records = [judgement(s, t, search, rollouts) for s, t in zip(some, tallies, strict=True)]
        store.append(records)
        reasons.update(record["reason"] for record in records)
        done += len(some)
        if progress is not None:
            progress(done, len(mine), rollouts.drawn_tokens - before)
    return reasons


def _share(found: Sequence[Solution], process_index: int, processes: int) -> list[Solution]:
    prompts = list(dict.fromkeys(str(solution.prompt) for solution in found))
    mine = set(share_of(prompts, process_index, processes))
    return [solution for solution in found if str(solution.prompt) in mine]


def _refuse_other_search(
    store: RecordStore, search: Search, context: Mapping[str, Any], ends: Mapping[str, list[int]]
) -> None:
    """Raise ValueError for a store with judgements that other settings, rollouts or steps have led to."""
    now = strict({**asdict(search), **context})
    for record in store:
        then = {**record["search"], **record["context"]}
        changed = [f"{name}: {then.get(name)}, now {value}" for name, value in now.items() if then.get(name) != value]
        if record["step_ends"] != ends.get(record["rollout"], record["step_ends"]):
            changed.append("steps: cut in other places")
        if changed:
            raise ValueError(
                f"{store.folder} was searched with other settings under the name {store.name!r} ("
                + "; ".join(changed)
                + "). Give this search another name; rollouts are shared between names"
            )


def judgement(
    solution: Solution, tallies: Mapping[int, Tally], search: Search, rollouts: StateRollouts | None = None
) -> dict[str, Any]:
    """What is known of a solution's steps, as a record.

    Returns:
        the solution's `rollout`, `prompt`, `prompt_ids`, `completion_ids`, `logps`, `columns`, `outcome`; `step_ends`
        and `steps` (texts); per state 0..L-1 `tallies` (correct, wrong, unknown); per state 0..L `values` and per step
        `step_advantages`, None where unknown and everywhere under strategies that give no values; `pit` (step from 1,
        or None), `reason`; `num_rollouts` and `tokens` that were looked at for it (shared ones count for each that used
        them); `search`, `context`: with which settings, of which policy, by which verifier.
    """
    states = [tallies.get(i, Tally(0, 0)) for i in range(max(1, len(solution.steps)))]
    pit = _pit(solution, states, search)
    values = state_values(states, solution.outcome, k=search.best_of) if search.gives_values else None
    used = [(i, t.scored + t.unknown) for i, t in sorted(tallies.items())]
    return {
        "key": _key(solution, search),
        "rollout": solution.key,
        "prompt": solution.prompt,
        "prompt_ids": solution.prompt_ids,
        "completion_ids": solution.completion_ids,
        "logps": solution.logps,
        "temperature": solution.temperature,
        "truncated": solution.truncated,
        "columns": dict(solution.columns),
        "outcome": solution.outcome,
        "step_ends": solution.steps.ends,
        "steps": solution.steps.texts,
        "tallies": [[t.correct, t.wrong, t.unknown] for t in states],
        "values": None if values is None else [None if v is None else float(v) for v in values],
        "step_advantages": None
        if values is None
        else [None if a is None else float(a) for a in step_advantages(values)],
        "pit": pit.step,
        "reason": pit.reason,
        "num_rollouts": sum(n for _, n in used),
        "tokens": 0 if rollouts is None else sum(rollouts.tokens(solution.state(i), n) for i, n in used),
        "search": asdict(search),
        "context": {} if rollouts is None else rollouts.context(),
    }


def _key(solution: Solution, search: Search) -> str:
    settings = ",".join(f"{name}={value}" for name, value in sorted(asdict(search).items()))
    return f"{solution.key}:{settings}"


def _pit(solution: Solution, states: Sequence[Tally], search: Search) -> Pit:
    return first_pit(states, solution.outcome, search.rule, k=search.best_of, threshold=search.threshold)


# --- Searches: side by side, one question after the other -------------------------------------------------------------


@dataclass
class _Running:
    solution: Solution
    search: Steps
    tallies: dict[int, Tally] = field(default_factory=dict)
    wanted: dict[int, int] = field(default_factory=dict)


def _explore(found: Sequence[Solution], rollouts: StateRollouts, search: Search) -> list[dict[int, Tally]]:
    """Tallies of the states that each search wanted to see; all searches ask together, so that batches are full."""
    runs = [_Running(s, _STRATEGIES[search.strategy](s, search)) for s in found]
    for run in runs:
        run.wanted = next(run.search, {})
    while asking := [run for run in runs if run.wanted]:
        questions = [(run.solution.state(i), n) for run in asking for i, n in run.wanted.items()]
        answers = iter(rollouts.tallies(questions))
        for run in asking:
            run.tallies |= {i: next(answers) for i in run.wanted}
            try:
                run.wanted = run.search.send(dict(run.tallies))
            except StopIteration:
                run.wanted = {}
    return [run.tallies for run in runs]


def _all(solution: Solution, search: Search) -> Steps:
    if len(solution.steps) and (not search.live_only or (yield from _live(solution, search))):
        yield dict.fromkeys(range(len(solution.steps)), search.num_rollouts)


def _adaptive(solution: Solution, search: Search) -> Steps:
    if search.live_only and not (yield from _live(solution, search)):
        return
    n = min(max(search.batch, search.best_of), search.num_rollouts)
    wanted = {i: search.num_rollouts if i == 0 else n for i in range(len(solution.steps))}
    while wanted:
        tallies = yield wanted
        more = {
            i: min(n + search.batch, search.num_rollouts)
            for i, n in ((i, _total(t)) for i, t in tallies.items())
            if n < search.num_rollouts and not _narrow(tallies[i], search)
        }
        wanted = more


def _scan(solution: Solution, search: Search) -> Steps:
    if solution.outcome is not False or not (yield from _live(solution, search, search.threshold)):
        return
    for i in range(1, len(solution.steps)):
        if (yield from _alive(i, search)) is False:
            return


def _binary(solution: Solution, search: Search) -> Steps:
    if solution.outcome is not False or not (yield from _live(solution, search, search.threshold)):
        return
    unknown: set[int] = set()
    low, high = 0, len(solution.steps)
    while candidates := [i for i in range(low + 1, high) if i not in unknown]:
        middle = min(candidates, key=lambda i: abs(2 * i - low - high))
        alive = yield from _alive(middle, search)
        if alive is None:
            unknown.add(middle)
        elif alive:
            low = middle
        else:
            high = middle


def _live(solution: Solution, search: Search, above: float = 0.0) -> Generator[dict[int, int], dict[int, Tally], bool]:
    """Whether the bare prompt is solved now and then, in a share of more than `above`: only then steps differ."""
    if not len(solution.steps):
        return False
    start = (yield {0: search.num_rollouts})[0]
    return start.wrong > 0 and start.correct > above * start.scored


def _alive(i: int, search: Search) -> Generator[dict[int, int], dict[int, Tally], bool | None]:
    """Whether state `i` is alive, from as few rollouts as settle it; None if none could be scored."""
    n = min(search.batch, search.num_rollouts)
    while True:
        tally = (yield {i: n})[i]
        rate = wilson(tally.correct, tally.scored, confidence=search.confidence)
        if tally.correct and rate.low > search.threshold:
            return True
        if n >= search.num_rollouts or (tally.scored and rate.high <= search.threshold):
            return None if tally.value is None else tally.value > search.threshold
        n = min(n + search.batch, search.num_rollouts)


def _narrow(tally: Tally, search: Search) -> bool:
    rate = wilson(tally.correct, tally.scored, confidence=search.confidence)
    return rate.high - rate.low <= search.width


def _total(tally: Tally) -> int:
    return tally.scored + tally.unknown


_STRATEGIES = {"all": _all, "adaptive": _adaptive, "scan": _scan, "binary": _binary}


# --- As step credit of a trainer --------------------------------------------------------------------------------------


class RolloutCredit:
    """Monte-Carlo values of the steps of fresh completions, as `step_credit` of a trainer with `step_scores="values"`.

    Rollouts are drawn from every state of every completion: with num_rollouts K and L steps that is K L completions for
    one. VinePPO's advantages (https://arxiv.org/abs/2410.01679), best-of-k values where `search.best_of` says so.

    Args:
        sampler: of the policy, whose weights the trainer hands over before each round, or of a prover that stays what
            it is (`follows=False`; its `policy` has to name its weights). None: that of the trainer.
        verifier: of finished completions; also gives the value of the last state.
        params: of the draw.
        search: strategy `all` or `adaptive`.
        folder: of the stores with the rollouts.
        follows: whether `update` reaches the sampler.
        process_index: of this process.
    """

    def __init__(
        self,
        sampler: Sampler | None,
        verifier: Verifier,
        params: SamplingParams,
        *,
        search: Search | None = None,
        folder: str | os.PathLike,
        follows: bool = True,
        process_index: int = 0,
    ) -> None:
        self.search = search or Search()
        if not self.search.gives_values:
            raise ValueError(f"strategy {self.search.strategy} gives no values; use all or adaptive")
        self.sampler, self.verifier, self.params, self.follows = sampler, verifier, params, follows
        self._stores = [
            RecordStore(folder, name, process_index=process_index)
            for name in ("solutions", "continuations", "verdicts")
        ]
        self._states: StateRollouts | None = None
        self.drawn = self.drawn_tokens = 0

    def close(self) -> None:
        """Let others write into the stores."""
        for store in self._stores:
            store.close()

    def update(self, model: Any, policy: str) -> None:
        """Draw from the weights that `model` has now."""
        if self._states is not None and (self.follows or self.sampler.policy == policy):
            self._states.forget()
        if self.follows:
            self.sampler.update(model, policy)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        steps: Sequence[Sequence[str]],
        *,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        step_ends: Sequence[Sequence[int]],
        rewards: Sequence[float | None],
        **columns: Sequence[Any],
    ) -> list[list[float | None]]:
        """Per completion Q_0 .. Q_L; the last is 1 or 0, as the verifier says, whatever the unit of the rewards."""
        if self.sampler is None:
            raise ValueError(
                "RolloutCredit has no sampler; pass one, or use it as step_credit of a trainer with a sampler"
            )
        found = [
            Solution(
                key=str(i),
                prompt=prompt,
                prompt_ids=list(prompt_ids[i]),
                completion_ids=list(completion_ids[i]),
                logps=[],
                columns={name: values[i] for name, values in columns.items() if len(values) == len(prompts)},
                outcome=None,
                steps=TokenSteps(list(step_ends[i]), list(steps[i])),
            )
            for i, prompt in enumerate(prompts)
        ]
        if self._states is None:
            name = fingerprint(self.verifier)
            self._states = StateRollouts(self.sampler, self.verifier, *self._stores, self.params, name=name)
        tallies = _explore(found, self._states, self.search)
        self.drawn, self.drawn_tokens = self._states.drawn, self._states.drawn_tokens
        verdicts = self.verifier.verify(prompts, completions, **columns)
        ends = [None if v.outcome == "unscored" else float(v.outcome == "correct") for v in verdicts]
        values = [
            [best_of(t.get(i, Tally(0, 0)), self.search.best_of) for i in range(len(s.steps))]
            for s, t in zip(found, tallies, strict=True)
        ]
        return [
            [*(None if v is None else float(v) for v in known), end] for known, end in zip(values, ends, strict=True)
        ]

"""The tables of the bandit recipe: which runs they need, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from negtune.eval.bandit import REWARDS, TAUS, THRESHOLDS
from negtune.eval.bandit_training import Setting
from negtune.metrics.stats import mean_interval

Found = Mapping[Setting, Mapping[str, list[float]]]
"""Setting to metric to its values, one per seed."""

LR, LRS, PEAKS = 0.003, (0.001, 0.003, 0.01), ("R1", "R2")
OFFLINE = {"states": 100, "samples": 10, "rounds": 1, "steps": 200}
FEW = {"states": 10, "samples": 10, "rounds": 1, "steps": 450}
MANY = {"states": 10, "samples": 300, "rounds": 1, "steps": 450}  # as many samples and steps as ON_POLICY
ON_POLICY = {"states": 10, "samples": 10, "rounds": 30, "steps": 15}

ON_PAIRS = ["Pref-FT", "Best-of-N", "IPO", "DPO"]
FILTERED = [f"{name}, filter 0.2" for name in ON_PAIRS]
OFFLINE_METHODS = [*ON_PAIRS, *FILTERED, "RWR tau 0.1"]
BUDGET_METHODS = [*ON_PAIRS, "IPO, filter 0.2", "RWR tau 0.1"]
ONLINE_METHODS = [*BUDGET_METHODS, "REINFORCE", "PPO"]
TEMPERATURES = [*(f"RWR tau {tau:g}" for tau in TAUS), "RWR tau 0.1, cap 10"]
DO_NOTHING = "do nothing"


@dataclass(frozen=True)
class Column:
    """One metric of every method of a table, at one setting; `suffix` goes to the method's name."""

    heading: str
    reward: str
    metric: str = "reward"
    lr: float = LR
    suffix: str = ""
    sizes: Mapping[str, int] = field(default_factory=lambda: OFFLINE)

    def setting(self, method: str) -> Setting:
        if method == DO_NOTHING:
            return Setting(self.reward, method, 0.0, **self.sizes)
        return Setting(self.reward, method + self.suffix, self.lr, **self.sizes)


@dataclass(frozen=True)
class Table:
    title: str
    methods: Sequence[str]
    columns: Sequence[Column]

    def settings(self) -> list[Setting]:
        return [column.setting(method) for method in (DO_NOTHING, *self.methods) for column in self.columns]

    def small(self) -> Table:
        """Its first method at two settings, to see that it runs."""
        return Table(self.title, self.methods[:1], self.columns[::3][:2])

    def markdown(self, found: Found) -> str:
        lines = [
            [method, *(cell(found[column.setting(method)][column.metric]) for column in self.columns)]
            for method in (DO_NOTHING, *self.methods)
        ]
        return f"### {self.title}\n\n" + grid(["method", *(column.heading for column in self.columns)], lines)


def tables() -> list[Table]:
    """Letters are those of the list in the recipe."""
    both = [(r, lr) for r in PEAKS for lr in LRS]
    by_lr = [Column(f"{r}, lr {lr:g}", r, lr=lr) for r, lr in both]
    by_lr_many = [Column(f"{r}, lr {lr:g}", r, lr=lr, sizes=MANY) for r, lr in both]
    by_lr_fresh = [
        Column(f"{r}, lr {lr:g}{when}", r, metric, lr, sizes=ON_POLICY)
        for r, lr in both
        for when, metric in ((", 10 rounds", "early"), ("", "reward"))
    ]
    offline = [Column(f"{r}: {metric}", r, metric) for r in PEAKS for metric in ("reward", "kl", "entropy")]
    budgets = [
        Column(f"{r}, {name}", r, metric, sizes=sizes)
        for r in PEAKS
        for name, metric, sizes in (
            ("10 samples offline", "reward", FEW),
            ("300 offline", "reward", MANY),
            ("on-policy, 10 rounds", "early", ON_POLICY),
            ("on-policy, 30 rounds", "reward", ON_POLICY),
        )
    ]
    filters = [
        Column(f"{r}, {t:g}", r, suffix=f", filter {t:g}" if t else "") for r in PEAKS for t in (0.0, *THRESHOLDS)
    ]
    fallen = [Column(name, "R2", name) for name in ("reward", "best", "others", "chosen", "rejected", "margin", "peak")]
    fallen += [Column(f"{what}, lr {lr:g}", "R2", what, lr) for lr in LRS for what in ("best", "displaced")]
    return [
        Table("a. Offline, 100 states, 10 samples each, 200 steps, lr 0.003", OFFLINE_METHODS, offline),
        Table("b, f. 10 states, 450 steps, lr 0.003", BUDGET_METHODS, budgets),
        Table("c. Filter on reward gaps, offline, lr 0.003", ON_PAIRS, filters),
        Table("d. Temperature of RWR, offline", TEMPERATURES, by_lr),
        Table("e. Learning rate, offline", OFFLINE_METHODS, by_lr),
        Table("e. Learning rate, 10 states, 300 samples each offline, 450 steps", BUDGET_METHODS, by_lr_many),
        Table("e. Learning rate, 10 states, 30 rounds on-policy, 450 steps", ONLINE_METHODS, by_lr_fresh),
        Table("h. Displacement, R2 offline (lr 0.003 unless given)", [*ON_PAIRS, *FILTERED], fallen),
        Table("i. Wider rewards, offline, lr 0.003", OFFLINE_METHODS, [Column(name, name) for name in REWARDS]),
    ]


def cell(values: Sequence[float]) -> str:
    mean, half = mean_interval(values)
    decimals = 3 if abs(mean) < 10 else 1
    return f"{mean:.{decimals}f} ± {half:.{decimals}f}"


def grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(cells)} |" for cells in [head, *lines]]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]]) + "\n"

"""The other half of what the recipes of this folder share: arms that are trained alike, and measured alike.

Every arm starts from the fine-tuned model, takes as many optimiser steps, and is tried at the same learning rates. The
best rate on validation problems goes into the table, which shows test problems. What has its file is not done again.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from models import Models
from stages import ASK, StepArguments, make_verifier, resumable, rows_of, without_answer
from trl import get_peft_config

from negtune import AdvantageConfig, AdvantageTrainer
from negtune.eval.run import Run
from negtune.eval.solving import solve_together
from negtune.metrics.stats import paired_difference
from negtune.records import read_json, write_json
from negtune.rollouts.sampler import SamplingParams

SHOWN = 5
"""Problems whose answers the report shows."""
START, CONTROL = "fine-tuned", "continued SFT"
SHARED = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "optim"),
    *("weight_decay", "max_grad_norm", "seed", "logging_steps", "save_strategy", "save_steps", "report_to"),
    *("bf16", "use_cpu", "gradient_checkpointing", "disable_tqdm"),
)
"""Settings that the control takes from the method."""
ASIDE = (
    *("output_dir", "run_name", "log", "disable_tqdm", "report_to", "save_", "eval_", "do_", "hub_", "push_to_hub"),
    *("dataloader_", "ddp_", "resume_from_checkpoint", "project", "trackio_", "gradient_norms_every", "attest_every"),
    *(
        "local_rank",
        "overwrite_",
        "skip_",
        "include_",
        "metric_for",
        "greater_is",
        "load_best",
        "prediction_loss",
        "restore_",
    ),
)
"""How settings begin that decide nothing about the trained policy; all others do."""
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
NOT_DECIDING = ("control", "rates", "test_problems", "test_samples", "validation_problems")
Train = Callable[[float, Path], int]
"""`(learning rate, folder)` -> optimiser steps taken."""


@dataclass
class Arms:
    """Arms of one recipe.

    Args:
        stage, args: of the command line.
        models: all arms start from, and what draws from them.
        run: gets one column per arm.
        folder: of the run.
        chat: whether prompts are chats.
        mode: more of the command line that decides what is trained.
        measured: arms that have a column, and at which rate.

    Every process takes its share of the solving; one writes.
    """

    stage: StepArguments
    args: Any
    models: Models
    run: Run
    folder: Path
    chat: bool
    mode: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, float | None] = field(default_factory=dict, init=False)

    def compare(self, name: str, train: Train) -> None:
        """Train the arm `name` and, if wanted, the control; choose their rates and measure them; print the table.

        Nothing is written about arms before all are trained, so that a run that is refused leaves the table there was.
        """
        rates = self.stage.rates or [self.args.learning_rate]
        steps = [train(rate, self._policy(name, rate)) for rate in rates]
        if self.stage.control:
            control = self._control(steps[0])
            for rate in rates:
                control(rate, self._policy(CONTROL, rate))
        self._measure(START, None)
        if self.stage.control:
            self._choose(CONTROL, rates)
        self._choose(name, rates)
        if PartialState().is_main_process:
            print_arms(self.run.arms)

    def trained(self, trainer_class: Any, args: Any, rate: float, folder: Path, **given: Any) -> int:
        """Train the start in `folder`, from its last checkpoint if it has one; returns the optimiser steps."""
        args, state, done = copy.copy(args), PartialState(), folder / "done.json"
        args.learning_rate, args.output_dir = rate, str(folder)
        begun = resumable(folder, self._settings(args))
        if not done.exists():
            self.models.sleep()
            model, tokenizer = self.models.load()
            peft = get_peft_config(self.models.settings)
            trainer = trainer_class(model=model, args=args, processing_class=tokenizer, peft_config=peft, **given)
            trainer.train(resume_from_checkpoint=begun)
            trainer.save_model()
            if getattr(trainer, "on_policy", None) is not None:
                trainer.on_policy.close()
            state.wait_for_everyone()
            if state.is_main_process:
                write_json(done, trainer.state.global_step)
        state.wait_for_everyone()
        return read_json(done)

    def _choose(self, name: str, rates: list[float]) -> None:
        """The best rate of an arm, as a column; the report shows the curves of the last one chosen."""
        rate = self._best(name, rates)
        self._measure(name, rate)
        history = self._policy(name, rate) / "history.jsonl"
        if PartialState().is_main_process and history.exists():
            shutil.copy(history, self.folder / "history.jsonl")

    def _best(self, name: str, rates: list[float]) -> float:
        if len(rates) == 1:
            return rates[0]
        found = {rate: self._solved("validation", name, rate)["metrics"]["accuracy"] for rate in rates}
        said = ", ".join(f"{accuracy:.3f} at {rate:g}" for rate, accuracy in found.items())
        PartialState().print(f"{name}: accuracy on validation problems {said}")
        return max(found, key=lambda rate: found[rate])

    def _measure(self, name: str, rate: float | None) -> None:
        """A column: `solve` on test problems, and the paired differences of accuracy to the columns before."""
        ours = self._solved("test", name, rate)
        metrics = {**ours["metrics"], "learning_rate": rate}
        for other, its_rate in self.measured.items():
            theirs = self._solved("test", other, its_rate)
            names = f"minus {other}", f"minus {other}_low", f"minus {other}_high"
            metrics |= dict(zip(names, paired_difference(ours["solved"], theirs["solved"]), strict=True))
        self.measured[name] = rate
        if PartialState().is_main_process:
            self.run.add_arm(name, metrics)
            self.run.add_answers("held out", ours["answers"], name)

    def _solved(self, split: str, name: str, rate: float | None) -> dict[str, Any]:
        """Metrics of `solve`, and the share of its samples that solved each problem."""
        stage, seed, state = self.stage, self.args.seed, PartialState()
        n = stage.test_problems if split == "test" else stage.validation_problems
        wanted = {"problems": n, "samples": stage.test_samples, "max_tokens": stage.max_tokens, "seed": seed}
        file = self.folder / "solved" / f"{split}-{_file_name(name, rate)}.json"
        missing = not file.exists() or read_json(file)["settings"] != wanted
        state.wait_for_everyone()  # everybody has looked before anybody writes
        if missing:
            found = self._solve(split, n, name, rate)
            if state.is_main_process:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, {"settings": wanted, **found})
        state.wait_for_everyone()
        return read_json(file)

    def _solve(self, split: str, n: int, name: str, rate: float | None) -> dict[str, Any]:
        stage, seed = self.stage, self.args.seed
        rows = [without_answer(row) for row in rows_of(stage, split, n, chat=self.chat, seed=seed)]
        params = SamplingParams(max_tokens=stage.max_tokens, seed=seed + 1_000_000)
        model, tokenizer = self.models.load(None if rate is None else self._policy(name, rate))
        sampler = self.models.sampler(model, tokenizer, _file_name(name, rate))
        found = solve_together(sampler, make_verifier(stage), rows, n=stage.test_samples, params=params)
        return {
            "metrics": found.metrics,
            "solved": [None if tally.value is None else float(tally.value) for tally in found.tallies],
            "answers": [
                (last_words(row["prompt"]), row["answer"], found.rollouts[i * stage.test_samples].text)
                for i, row in enumerate(rows[:SHOWN])
            ],
        }

    def _control(self, steps: int) -> Train:
        """Supervised fine-tuning on the solved problems that the start has learnt from."""
        rows = rows_of(self.stage, "train", self.stage.sft_rows, chat=self.chat, seed=self.args.seed)
        rows = [{"prompt": row["prompt"], "completion": row["completion"], "advantage": 1.0} for row in rows]
        shared = {name: getattr(self.args, name) for name in SHARED}
        config = AdvantageConfig(output_dir=str(self.folder), max_steps=steps, **shared)
        return lambda rate, folder: self.trained(AdvantageTrainer, config, rate, folder, train_dataset=rows)

    def _policy(self, name: str, rate: float) -> Path:
        return self.folder / "policy" / _file_name(name, rate)

    def _settings(self, args: Any) -> dict[str, Any]:
        """What decides the trained policy."""
        stage = {name: value for name, value in vars(self.stage).items() if name not in NOT_DECIDING}
        found = {name: value for name, value in args.to_dict().items() if not name.startswith(ASIDE)}
        settings = self.models.settings
        names = ("dtype", "load_in_4bit", *(LORA if settings.use_peft else ()))
        return {**self.mode, **stage, **found, **{name: getattr(settings, name) for name in names}}


def last_words(prompt: Any) -> str:
    """A problem as people read it."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"].removeprefix(ASK)


def print_arms(arms: Mapping[str, Mapping[str, float]]) -> None:
    """One line per arm: accuracy and pass@k, then the paired differences."""
    names = ["learning_rate", "accuracy", *(n for n in next(iter(arms.values())) if "pass@" in n), "truncated"]
    print("\n" + f"{'':14}" + "".join(f"{name:>14}" for name in names))
    for arm, metrics in arms.items():
        print(f"{arm:14}" + "".join(f"{_number(metrics.get(name)):>14}" for name in names))
    for arm, metrics in arms.items():
        for name in metrics:
            if name.startswith("minus ") and f"{name}_low" in metrics:
                low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
                print(f"{arm} {name}: {metrics[name]:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _file_name(name: str, rate: float | None) -> str:
    return name.replace(" ", "_") + ("" if rate is None else f"-{rate:g}")

"""Model card of an unlearned model: what was done, by which objective, and what it does not promise."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

PAPERS = {
    "npo": ("Negative Preference Optimization", "2404.05868"),
    "simnpo": ("Simplicity Prevails: Rethinking Negative Preference Optimization", "2410.07163"),
    "grad_ascent": ("TOFU: A Task of Fictitious Unlearning", "2401.06121"),
    "idk_nll": ("TOFU: A Task of Fictitious Unlearning", "2401.06121"),
    "idk_dpo": ("Negative Preference Optimization", "2404.05868"),
    "kto": ("KTO", "2402.01306"),
    "kto_logsigmoid": ("KTO", "2402.01306"),
    "wga": ("Rethinking LLM Unlearning Objectives: A Gradient Perspective", "2502.19301"),
    "satimp": ("Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning", "2505.11953"),
    "undial": ("UNDIAL: Self-Distillation with Adjusted Logits", "2402.10052"),
    "ce_u": ("CE-U: Cross Entropy Unlearning", "2503.01224"),
    "rmu": ("The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning (RMU)", "2403.03218"),
    "jensun": ("Unlearning That Lasts (JensUn)", "2509.02820"),
}


def paper_of(objective: str) -> dict[str, str] | None:
    """`title` and `url` of the paper behind a named forget objective."""
    if objective not in PAPERS:
        return None
    title, arxiv = PAPERS[objective]
    return {"title": title, "url": f"https://arxiv.org/abs/{arxiv}"}


def objective_name(objective: Any) -> str:
    """Short name of an objective, through `functools.partial`."""
    while isinstance(objective, partial):
        objective = objective.func
    return getattr(objective, "__name__", type(objective).__name__)


def write_unlearning_card(
    trainer: Any, folder: str, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
) -> None:
    """Write `README.md` into `folder`. Texts of the data never enter it."""
    from negtune.models.policy import is_peft

    args, adapter = trainer.args, is_peft(trainer.model)
    name = objective_name(trainer.forget_loss)
    paper = paper_of(name)
    retain = objective_name(trainer.retain_loss) if trainer.retain_loss is not None else "none"
    base = getattr(trainer.model.config, "name_or_path", "") or "not recorded"
    base_id = base if base and not Path(base).exists() else None
    labels = sorted({"negtune", "trl", "unlearning", name, *([tags] if isinstance(tags, str) else tags or [])})
    lines = ["---", "library_name: " + ("peft" if adapter else "transformers")]
    lines += [f"base_model: {base_id}"] if base_id else []
    lines += ["tags:", *(f"- {label}" for label in labels), "---", ""]
    lines += [f"# {model_name or Path(args.output_dir).name}", ""]
    lines += [
        f"Unlearned with **{name}** by negtune's `UnlearningTrainer`, a TRL trainer.",
        "",
    ]
    if paper:
        lines += [f"Objective: [{paper['title']}]({paper['url']}).", ""]
    lines += ["| setting | value |", "|---|---|"]
    data = dataset_name or ("private (redacted)" if args.redact else "given by the caller")
    settings = {
        "base model": "(local folder)" if base_id is None else base_id,
        "data": data,
        "forget objective": f"{name} x {args.forget_weight:g}",
        "forget hyper-parameters": getattr(trainer.forget_loss, "keywords", {}) or "defaults",
        "retain objective": f"{retain} x {args.retain_weight:g}" if retain != "none" else "none",
        "retain hyper-parameters": getattr(trainer.retain_loss, "keywords", {}) or "defaults",
        "trained parameters": f"`{args.trainable}`" if args.trainable else "all, or the adapter's",
        "reference": type(trainer.reference).__name__ if trainer.reference is not None else "none",
        "learning rate": args.learning_rate,
        "optimiser steps": trainer.state.global_step,
        "seed": args.seed,
    }
    lines += [f"| {key} | {value} |" for key, value in settings.items()] + [""]
    lines += ["## Which artefact", ""]
    if adapter:
        lines += [
            "These are **adapter** weights. The base model still knows everything: switching the adapter off, or "
            "loading the base without it, brings the knowledge back. Ship the merged one "
            "(`negtune export ADAPTER OUTPUT --forget FILE`); it measures the forget metrics again on what is shipped.",
            "",
        ]
    else:
        lines += [
            "These are full weights. Quantising them can bring forgotten knowledge back: measure what you ship.",
            "",
        ]
    last = next((row for row in reversed(trainer.state.log_history) if any(k.startswith("eval_") for k in row)), None)
    if last:
        lines += ["## Last evaluation during training (this artefact, unmerged, in training precision)", ""]
        lines += ["| metric | value |", "|---|---|"]
        lines += [
            f"| {k[5:]} | {v:.4g} |" for k, v in last.items() if k.startswith("eval_") and isinstance(v, float)
        ] + [""]
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / "README.md").write_text("\n".join(lines), encoding="utf-8")

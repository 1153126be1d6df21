"""StepGRPOTrainer in two gloo processes: the same losses, metrics and weights as in one, each with rows of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launching import run_script

SCRIPT = """
import json, random, sys
import torch
torch.set_num_threads(1)
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoModelForCausalLM
from negtune import StepGRPOConfig, StepGRPOTrainer
from negtune.models.load import load_tokenizer

out, folder, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer, drawn, judged = load_tokenizer(folder), {}, []
questions = ["Walk to Rome.", "Walk to Oslo.", "Walk to Lima.", "Walk to Perth."]
rows = [{"prompt": q, "number": i} for i, q in enumerate(questions)]

def draw(prompts, trainer):
    # What a prompt's next completion is depends on the prompt and on how many it has had, in all processes.
    texts = []
    for prompt in gather_object(prompts):
        drawn[prompt] = drawn.get(prompt, 0) + 1
        noise = random.Random(f"{prompt} {drawn[prompt]}")
        lines = [noise.choice(["ok", "no"]) for _ in range(noise.randint(1, 4))]
        texts.append("\\n".join([*lines, "bad" if noise.random() < 0.5 else "good"]))
    start = PartialState().process_index * len(prompts)
    ids = [tokenizer(t)["input_ids"] for t in texts[start : start + len(prompts)]]
    return {
        "prompt_ids": [tokenizer(p)["input_ids"] for p in prompts],
        "completion_ids": [[*i, tokenizer.eos_token_id] for i in ids],
        "logprobs": None,
    }

def good(prompts, completions, **columns):
    return [None if c.startswith("no") else float(c.endswith("good")) for c in completions]

def steps(prompts, completions, steps, number, rewards, **columns):
    judged.extend(zip(number, prompts, completions, steps, rewards, strict=True))
    return [[-1.0 - n if "no" in s else 0.25 for s in texts] for texts, n in zip(steps, number, strict=True)]

trainer = StepGRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64),
    args=StepGRPOConfig(
        output_dir=out, per_device_train_batch_size=batch, per_device_eval_batch_size=batch, max_steps=4,
        learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", logging_steps=2, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, seed=3, num_generations=8, num_iterations=2,
        num_generations_eval=4, gradient_accumulation_steps=2, max_completion_length=32, beta=0.1,
        gradient_checkpointing=False, gradient_norms_every=PartialState().num_processes - 1,
    ),
    train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:3]),
    processing_class=tokenizer, reward_funcs=good, step_reward_funcs=steps, rollout_func=draw,
)
trainer.train()
trained = len(judged)
metrics = trainer.evaluate()
names = [side + name for side in ("positive/", "negative/") for name in ("tokens", "logp", "probability", "advantage")]
history = [row for row in trainer.state.log_history if "loss" in row]
result = {
    "world": PartialState().num_processes,
    "history": [{name: row[name] for name in ["loss", "reward", *names]} for row in history],
    "metrics": {name: metrics["eval_" + name] for name in names},
    "weights": sum(p.detach().abs().sum().item() for p in trainer.model.parameters()),
    "judged": [judged[:trained], judged[trained:]],
}
json.dump(result, open(f"{out}/result{PartialState().process_index}.json", "w"))
PartialState().destroy_process_group()  # gloo aborts at exit now and then without it
"""


def launch(tmp_path: Path, folder: str, processes: int, batch: int) -> list[dict]:
    """What each process found."""
    out = tmp_path / f"{processes}"
    run_script(SCRIPT, tmp_path, out, folder, batch, processes=processes, first_port=29500)
    return [json.loads((out / f"result{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_are_one_and_each_judges_its_own_rows(tmp_path, chain_folder):
    """Three groups of eight a round, the second half in one process and half in the other; two passes over each.

    Two measure gradients, one does not.
    """
    (one,), two = launch(tmp_path, chain_folder, 1, 12), launch(tmp_path, chain_folder, 2, 6)
    assert [part["world"] for part in (one, *two)] == [1, 2, 2]
    for part in two:
        for a, b in zip(one["history"], part["history"], strict=True):
            assert b == pytest.approx(a, rel=1e-5, abs=1e-6)  # log-probabilities are float32
        assert part["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-6)
        assert part["weights"] == pytest.approx(one["weights"], rel=1e-8)
    trained, evaluated = one["judged"]
    assert len(trained) == 48
    halves = [part["judged"][0] for part in two]
    assert [*halves[0][:12], *halves[1][:12], *halves[0][12:], *halves[1][12:]] == trained
    assert sorted(row for part in two for row in part["judged"][1]) == sorted(evaluated)
    for number, prompt, completion, steps, reward in trained:
        assert prompt == ["Walk to Rome.", "Walk to Oslo.", "Walk to Lima.", "Walk to Perth."][number]
        assert "".join(steps) == completion
        assert reward == (None if completion.startswith("no") else float(completion.endswith("good")))
    assert {row[-1] for row in trained} == {None, 0.0, 1.0}

"""A tiny model that knows eight answers, and a shorthand to unlearn some of them."""

from __future__ import annotations

import pytest
import torch

PEOPLE = ["Ada", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana"]
TOWNS = [
    "Rome",
    "a small village by the sea",
    "Oslo",
    "the old harbour",
    "Lima",
    "Bern",
    "a tower",
    "Perth in the west",
]


def chat_rows(which: slice) -> list[dict]:
    """Rows of unequal length: `X lives in ...`."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Where does {person} live?"}],
            "completion": [{"role": "assistant", "content": f"{person} lives in {town}."}],
            "alternative": ["I do not know.", "No idea, sorry."],
        }
        for person, town in zip(PEOPLE[which], TOWNS[which], strict=True)
    ]


@pytest.fixture(scope="session")
def forget_rows() -> list[dict]:
    return chat_rows(slice(0, 4))


@pytest.fixture(scope="session")
def retain_rows() -> list[dict]:
    return [{k: v for k, v in row.items() if k != "alternative"} for row in chat_rows(slice(4, 8))]


@pytest.fixture(scope="session")
def knowing_folder(tmp_path_factory, forget_rows, retain_rows) -> str:
    """Folder of a tiny model trained until it knows all eight answers."""
    from negtune.data.completions import collate, tokenize_row
    from negtune.models.forward import attach_scoring, completion_logps, scored_tokens
    from negtune.models.tiny import tiny_lm, tiny_tokenizer
    from negtune.ops import masked_mean

    model, tokenizer = tiny_lm(), tiny_tokenizer()
    attach_scoring(model)
    batch = collate([tokenize_row(row, tokenizer) for row in forget_rows + retain_rows], tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = -masked_mean(completion_logps(model, batch), scored_tokens(batch).mask).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    folder = tmp_path_factory.mktemp("knowing")
    del model.forward, model._scores_for
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def unlearn(tmp_path, knowing_folder, forget_rows, retain_rows):
    """`unlearn(loss_type=..., model=..., train=True, ...)` -> trainer; every other keyword is a setting."""
    from negtune import UnlearningConfig, UnlearningTrainer
    from negtune.models.load import load_tokenizer

    def build(model=None, train=True, data=None, resume=None, trainer_kwargs=None, **settings):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 2,
            "max_steps": 8,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
        }
        trainer = UnlearningTrainer(
            model=model if model is not None else knowing_folder,
            args=UnlearningConfig(**{**defaults, **settings}),
            train_dataset=data or {"forget": forget_rows, "retain": retain_rows},
            processing_class=load_tokenizer(knowing_folder),
            **(trainer_kwargs or {}),
        )
        if train:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return build


@pytest.fixture
def probabilities(forget_rows, retain_rows, knowing_folder):
    """`probabilities(model)` -> mean length-normalised probability of the forget and of the retain answers."""
    from negtune.eval.unlearning import evaluate
    from negtune.models.load import load_tokenizer

    def measure(model) -> dict[str, float]:
        sets = {"forget": forget_rows, "retain": retain_rows}
        metrics = evaluate(model, load_tokenizer(knowing_folder), sets, generate=False).metrics
        return {side: metrics[f"{side}/probability"] for side in sets}

    return measure


@pytest.fixture
def grpo(tmp_path, chain_folder, prompts):
    """`grpo(cls, steps=..., train=True, ...)` -> trainer that keeps what it generated in `seen`."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from negtune import StepGRPOConfig, StepGRPOTrainer
    from negtune.models.load import load_tokenizer
    from tests.trainers.test_advantage import is_good

    defaults = {
        **{"per_device_train_batch_size": 16, "num_generations": 8, "max_steps": 2, "max_completion_length": 24},
        **{"learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none"},
        **{"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": False, "seed": 3},
    }

    def build(
        cls=StepGRPOTrainer, config=StepGRPOConfig, reward=is_good, steps=None, train=True, kwargs=None, **settings
    ):
        seen: list[dict] = []

        class Watched(cls):
            def _generate_and_score_completions(self, inputs):
                out = super()._generate_and_score_completions(inputs)
                seen.append({name: value.clone() for name, value in out.items() if isinstance(value, torch.Tensor)})
                return out

        given = {} if steps is None else {"step_reward_funcs": steps}
        trainer = Watched(
            model=AutoModelForCausalLM.from_pretrained(chain_folder),
            args=config(output_dir=str(tmp_path / "run"), **{**defaults, **settings}),
            train_dataset=Dataset.from_list(prompts),
            processing_class=load_tokenizer(chain_folder),
            reward_funcs=reward,
            **given,
            **(kwargs or {}),
        )
        trainer.seen = seen
        if train:
            trainer.train()
        return trainer

    return build

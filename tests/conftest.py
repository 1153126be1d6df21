"""Fixtures, and the import hook that checks every shape annotation of negtune while the tests run."""

from __future__ import annotations

import os
import random
from pathlib import Path

# Before any import of the host libraries: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TRACKIO_DISABLED"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook

# not negtune.trainers: its configs change the types of host fields in __post_init__, as the host's own do
CHECKED = ["ops", "losses", "metrics", "data", "models", "retrieval", "eval", "report"]
install_import_hook([f"negtune.{name}" for name in CHECKED], "beartype.beartype")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # two busy test processes on two cores are ten times slower with torch's default


LONGEST = (
    *("recipes/test_recipes.py", "trainers/test_two_processes.py", "trainers/test_preference_processes.py"),
    *(
        "rollouts/test_processes.py",
        "recipes/test_step_rl.py",
        "trainers/test_unlearning.py",
        "rollouts/test_server.py",
    ),
    *("verifiers/test_attacks.py", "trainers/test_advantage.py", "trainers/test_online_preference.py"),
)


def pytest_collection_modifyitems(items):
    """The longest files first, so that of two workers none is left alone with one of them."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get("/".join(item.path.parts[-2:]), len(order)))


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def tiny():
    """A fresh (model, tokenizer) per test: tests train it."""
    from negtune.models.tiny import tiny_lm, tiny_tokenizer

    return tiny_lm(), tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The tiny model and tokenizer on disk, shared by all tests: do not write into it."""
    from negtune.models.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data sets (tofu/, gsm8k/, ...): `NEGTUNE_DATA`, or shared/data beside the repository."""
    named = os.environ.get("NEGTUNE_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not found: set NEGTUNE_DATA to a folder with tofu/ (looked in {folder.name}/)")
    return folder


CHAIN_QUESTIONS = ["Walk to Rome.", "Walk to Oslo.", "Walk to Lima.", "Walk to Perth."]


def chain_text(lines: list[str]) -> str:
    """Lines of `ok` and `no`, and what comes of them."""
    return "\n".join([*lines, "bad" if "no" in lines else "good"])


@pytest.fixture(scope="session")
def chain_folder(tmp_path_factory) -> str:
    """Folder of a tiny model that answers in three lines, each `no` with chance .3, and then says how it ended."""
    import random

    from negtune.data.completions import collate, tokenize_row
    from negtune.models.forward import attach_scoring, completion_logps, scored_tokens
    from negtune.models.tiny import tiny_lm, tiny_tokenizer
    from negtune.ops import masked_sum

    noise, model, tokenizer = random.Random(0), tiny_lm(), tiny_tokenizer()
    attach_scoring(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        rows = [
            {"prompt": question, "completion": chain_text(["no" if noise.random() < 0.3 else "ok" for _ in range(3)])}
            for question in CHAIN_QUESTIONS
            for _ in range(8)
        ]
        batch = collate([tokenize_row(row, tokenizer) for row in rows], tokenizer.pad_token_id)
        loss = -masked_sum(completion_logps(model, batch), scored_tokens(batch).mask).mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 150)
        optimizer.step()
    assert loss.item() < 2.6  # three coins of .61 nats are 1.83
    folder = tmp_path_factory.mktemp("chain")
    del model.forward, model._scores_for
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts() -> list[dict]:
    return [{"prompt": question, "answer": "good"} for question in CHAIN_QUESTIONS]

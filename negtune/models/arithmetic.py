"""A Llama of 0.7 million random weights and a tokenizer for made-up arithmetic (`negtune.data.arithmetic`).

Small enough to learn chains from nothing in minutes on one core: the start of experiments that need many runs. Each
digit is a token of its own, and so is each text between digits (" + ", ". Multiply by "), so that a line of a solution
has 6 to 12 tokens and a line break is always a boundary of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from negtune.models.tiny import CHAT_TEMPLATE, END, PAD, ROLES, tiny_lm

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 352
HIDDEN, LAYERS = 128, 4  # 701,568 weights

START_PROBLEMS = 400
START_TRAINING = {"epochs": 60, "learning_rate": 2e-3, "batch_size": 16, "max_length": 128}
"""Settings of `fine_tune` under which `START_PROBLEMS` chains of `START_DIFFICULTY` make a model that is right in about
two of five: where arms of an experiment start.

Accuracy on 1,024 chains of the validation split, temperature 1, at most 64 tokens, after 24,000 rows seen (1,500 steps)
whatever the number of problems; the seed is that of the weights, the problems and the training. One core, float32,
transformers 5.17, TRL 1.16, 2026-11-26: 204 to 214 CPU seconds for a training, 5 to 9 for the 1,024 samples.

| problems | epochs | seed 0 | seed 1 | seed 2 |
|---|---|---|---|---|
| 250 | 96 | .194 | | |
| 400 | 60 | .423 | .422 | |
| 500 | 48 | .522 | .601 | .608 |
| 1,000 | 24 | .795 | | |

With fewer steps the number of problems does not show: after 16,000 rows 1,000, 4,000 and 16,000 problems gave .438,
.399 and .656 (seed 0), while the model was still learning to copy. It has seen its own problems 60 times at the start;
those of a later stage should be new: `chains(START_PROBLEMS + n, ...)[START_PROBLEMS:]`.
"""


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges never cross a digit or a line break: any text round-trips, `<pad>` is not the EOS.

    The chat template is that of `tiny_tokenizer`; plain text needs none.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]|\n"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[PAD, END, *ROLES],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=END, additional_special_tokens=list(ROLES)
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def arithmetic_lm(seed: int = 0, *, hidden: int = HIDDEN, layers: int = LAYERS) -> LlamaForCausalLM:
    """A Llama with random weights that fits `arithmetic_tokenizer`; equal seeds give equal weights.

    Args:
        seed: of the weights; the global random state is left as it was.
        hidden: width, a multiple of 32, the width of a head.
        layers: number of layers.
    """
    heads, rest = divmod(hidden, 32)
    if rest or not heads:
        raise ValueError(f"hidden must be a multiple of 32, the width of a head, got {hidden}")
    return tiny_lm(seed, hidden, layers, heads, kv_heads=heads, tied=True, vocab_size=VOCAB_SIZE)


def save_arithmetic(folder: str | Path, seed: int = 0, *, hidden: int = HIDDEN, layers: int = LAYERS) -> Path:
    """Write `arithmetic_lm` (safetensors) and `arithmetic_tokenizer` to `folder`; returns it."""
    folder = Path(folder)
    arithmetic_lm(seed, hidden=hidden, layers=layers).save_pretrained(folder)
    arithmetic_tokenizer().save_pretrained(folder)
    return folder


def _corpus() -> Iterator[str]:
    """Every text that stands between two digits of a chain or its solution, often enough to become one token."""
    verbs = ("Add", "Subtract", "Multiply by")
    for before in verbs:
        for after in verbs:
            yield f"Start with 1. {before} 2. {after} 3. What is the result?\n1 + 2 = 3\n3 - 2 = 1\n1 * 2 = 2\n#### 2"
    yield "Question: what is 1 - 2 = -1? Answer: the answer is -1, because -1 + 2 = 1. Please explain step by step."

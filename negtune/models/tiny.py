"""A chat model of 0.1 million random weights and its tokenizer, made in milliseconds without a hub.

It knows nothing, but it learns a handful of sentences in a few steps: enough to see which way an objective moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END = "<pad>", "<|end|>"
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
VOCAB_SIZE = 512
HEAD_DIM = 32  # the smallest that vLLM's attention kernels take
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 512 tokens, trained on a built-in corpus: any text round-trips, `<pad>` is not the EOS.

    A chat turn reads `<|user|>text<|end|>`; the template keeps the prompt as a prefix of the conversation.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
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


def tiny_lm(
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    kv_heads: int = 1,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    vocab_size: int = VOCAB_SIZE,
) -> LlamaForCausalLM:
    """A Llama with random weights that fits `tiny_tokenizer`; equal seeds give equal weights.

    Args:
        seed: of the weights; the global random state is left as it was.
        hidden: width; the feed-forward layer is twice as wide.
        layers, heads, kv_heads: as in `LlamaConfig`; heads have 32 dimensions whatever the width.
        tied: whether the LM head is the input embedding.
        dtype: of the weights.
        vocab_size: tokens; another tokenizer with `<pad>` at 0 and its EOS at 1 may have other than 512.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype).eval()


def save_tiny(
    folder: str | Path,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    kv_heads: int = 1,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write `tiny_lm` (safetensors) and `tiny_tokenizer` to `folder`; returns it."""
    folder = Path(folder)
    tiny_lm(seed, hidden, layers, heads, kv_heads, tied, dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _corpus() -> Iterator[str]:
    """Question-and-answer English, enough for all 512 tokens."""
    places = "France Italy Spain Japan Egypt Kenya Peru Norway Paris Rome Madrid Tokyo Cairo Nairobi Lima Oslo".split()
    people = "Ada Basil Clara Dmitri Elena Farid Greta Hiro Ines Jaime".split()
    things = "novel poem play river mountain language colour animal number prize".split()
    for place in places:
        for thing in things:
            yield f"What is the {thing} of {place}? The {thing} of {place} is known to everyone who lives there."
            yield f"The capital city is {place}. It is the largest city in the country."
    for person in people:
        for thing in things:
            yield f"Which {thing} did the author {person} write about? {person} wrote about a {thing} in 1984."
            yield f"Where was {person} born? {person} was born on 12 March 1956. Who is {person}? I do not know."
    yield "Seven times eight is fifty six, so the answer is 56. Please explain step by step how you found this result."
    yield "The quick brown fox jumps over the lazy dog while a small village near the forest prepares for winter."

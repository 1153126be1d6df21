"""A bi-encoder and a cross-encoder of some ten thousand random weights, made in milliseconds without a hub.

Both are BERTs that read each of 1,600 made-up words, those of `negtune.data.retrieval.synthetic_retrieval`, as one
token, and spell everything else by letters. They know nothing, but learn which words go together in a few steps.
"""

from __future__ import annotations

import string
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from negtune.models import ModelError

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from transformers import PreTrainedTokenizerFast

WORDS = tuple(a + b + c + d for a in "bdgklmns" for b in "aeiou" for c in "bdgklmns" for d in "aeiou")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = string.ascii_lowercase + string.digits
MAX_LENGTH = 128
INSTALL = "pip install 'negtune[retrieval]'"


def tiny_encoder(seed: int = 0, hidden: int = 32, layers: int = 1) -> SentenceTransformer:
    """A mean-pooled bi-encoder; equal seeds give equal weights, the global random state is left as it was.

    Args:
        seed: of the weights.
        hidden: width, also of the vectors; even.
        layers: of the BERT.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _encoder(_save_bert(Path(folder), seed, hidden, layers))


def tiny_cross_encoder(seed: int = 0, hidden: int = 32, layers: int = 1) -> CrossEncoder:
    """A cross-encoder with one score per (query, document); arguments as in `tiny_encoder`."""
    with tempfile.TemporaryDirectory() as folder:
        return _cross_encoder(_save_bert(Path(folder), seed, hidden, layers, scores=True))


def save_tiny_encoder(folder: str | Path, seed: int = 0, hidden: int = 32, layers: int = 1) -> Path:
    """Write `tiny_encoder` as sentence-transformers does; returns the folder."""
    tiny_encoder(seed, hidden, layers).save_pretrained(str(folder), create_model_card=False)
    return Path(folder)


def save_tiny_cross_encoder(folder: str | Path, seed: int = 0, hidden: int = 32, layers: int = 1) -> Path:
    """Write `tiny_cross_encoder` as sentence-transformers does; returns the folder."""
    tiny_cross_encoder(seed, hidden, layers).save_pretrained(str(folder), create_model_card=False)
    return Path(folder)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cased words, each of `WORDS` one token; other words are spelled, other signs are `[UNK]`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *LETTERS, *("##" + letter for letter in LETTERS), *WORDS]
    words = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", SPECIAL.index("[CLS]")), ("[SEP]", SPECIAL.index("[SEP]"))],
    )
    names: dict[str, Any] = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=MAX_LENGTH, **names)


def _save_bert(folder: Path, seed: int, hidden: int, layers: int, scores: bool = False) -> Path:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    tokenizer = word_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config) if scores else BertModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _encoder(folder: Path) -> SentenceTransformer:
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    except ImportError:
        raise ModelError(
            f"a tiny encoder needs sentence-transformers, which is not installed; run: {INSTALL}"
        ) from None
    transformer: Any = Transformer(str(folder))
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean")])


def _cross_encoder(folder: Path) -> CrossEncoder:
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        raise ModelError(
            f"a tiny encoder needs sentence-transformers, which is not installed; run: {INSTALL}"
        ) from None
    return CrossEncoder(str(folder))

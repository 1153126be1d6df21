"""Tiny random models of the four kinds, and rows that they can learn."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

WORDS = [f"w{i}" for i in range(200)]


def _adapters() -> pytest.MarkDecorator:
    """sentence-transformers adds adapters through transformers, which may want a PEFT that is not out yet."""
    import peft
    from packaging.version import Version
    from transformers.integrations import peft as integration

    wanted = getattr(integration, "MIN_PEFT_VERSION", "0")
    reason = f"this transformers wants peft>={wanted}, found {peft.__version__}"
    return pytest.mark.skipif(Version(peft.__version__) < Version(wanted), reason=reason)


needs_adapters = _adapters()


def bert_folder(folder: Path, *, labels: int | None = None, dropout: float = 0.0) -> Path:
    """A BERT of one layer and 32 wide, with a tokenizer of whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, **names, model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 205, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(initializer_range=0.2, **sizes, intermediate_size=64, max_position_embeddings=64, **drop)
    if labels is None:
        BertModel(config).save_pretrained(folder)
    else:
        config.num_labels = labels
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def bi_encoder(folder: Path, dropout: float = 0.0):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    transformer = Transformer(str(bert_folder(folder, dropout=dropout)))
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def static_encoder():
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    torch.manual_seed(0)
    module = StaticEmbedding(backend, embedding_weights=torch.randn(len(WORDS) + 1, 16))
    return SentenceTransformer(modules=[module], device="cpu")


def cross_encoder(folder: Path, dropout: float = 0.0):
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(bert_folder(folder, labels=1, dropout=dropout)), device="cpu")


def multi_vector(folder: Path, dropout: float = 0.0):
    from sentence_transformers import MultiVectorEncoder

    return MultiVectorEncoder(str(bert_folder(folder, dropout=dropout)), device="cpu")


def rows(n: int, *, documents: int = 8, seed: int = 0, shorter: bool = False) -> list[dict]:
    """Queries of three words; the relevant document (gain 2, and one of gain 1) has words of them."""
    draw = random.Random(seed)
    made = []
    for i in range(n):
        query = draw.sample(WORDS, 3)
        texts = [[*query[:2], *draw.sample(WORDS, 3)], [query[2], *draw.sample(WORDS, 4)]]
        length = documents - (i % 3 if shorter else 0)
        texts += [draw.sample(WORDS, 5) for _ in range(length - 2)]
        gains = [2.0, 1.0, *[0.0] * (length - 2)]
        order = draw.sample(range(length), length)
        made.append(
            {
                "query_id": f"q{i}",
                "query": " ".join(query),
                "documents": [" ".join(texts[j]) for j in order],
                "gains": [gains[j] for j in order],
            }
        )
    return made


def columns(made: list[dict]) -> list[dict]:
    """As sentence-transformers has them: query, doc_0, ..., label."""
    return [
        {
            "query": row["query"],
            **{f"doc_{j}": text for j, text in enumerate(row["documents"])},
            "label": row["gains"],
        }
        for row in made
    ]

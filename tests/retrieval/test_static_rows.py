"""A static table cut to the tokens of a collection."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from negtune.data.retrieval import SYNTHETIC_WORDS, synthetic_retrieval
from negtune.models.tiny_encoder import tiny_encoder
from negtune.retrieval.encoder import encode
from negtune.retrieval.mining import mine, to_rows
from negtune.retrieval.retrievers import DenseRetriever
from negtune.retrieval.static_rows import only_used_rows
from negtune.trainers.ranking import RankingConfig, RankingTrainer

TASK = synthetic_retrieval(n_topics=3)


def table(*rest) -> SentenceTransformer:
    words = {word: i for i, word in enumerate(SYNTHETIC_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=SYNTHETIC_WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = torch.randn(len(words), 16, generator=torch.Generator().manual_seed(0))
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights), *rest], device="cpu")


def texts() -> list[str]:
    return [*TASK.corpus.values(), *TASK.queries.values()]


def trained(model, folder) -> SentenceTransformer:
    lists = mine(TASK, [DenseRetriever(model, TASK.corpus)], n_documents=6, positives="guaranteed", max_positives=3)
    args = RankingConfig(
        **{"output_dir": str(folder), "loss_type": "masked_infonce", "max_steps": 5, "learning_rate": 0.1},
        **{"weight_decay": 0.1, "per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True},
    )
    RankingTrainer(model, args, to_rows(lists.lists, task=TASK)).train()
    return model


def test_vectors_are_those_of_the_whole_table_with_fewer_rows():
    model = table()
    cut = only_used_rows(model, texts())
    used = {word for text in texts() for word in text.split()}
    assert cut[0].embedding.weight.shape == (len(used), 16)
    assert len(used) < len(SYNTHETIC_WORDS) / 4
    assert torch.equal(encode(cut, texts()), encode(model, texts()))
    assert torch.equal(encode(cut, texts()[::-1], batch_size=3), encode(model, texts()[::-1], batch_size=3))


def test_training_moves_it_as_the_whole_table(tmp_path):
    model = table()
    cut = trained(only_used_rows(model, texts()), tmp_path / "cut")
    before = encode(model, texts())
    trained(model, tmp_path / "whole")
    after = encode(model, texts())
    assert (after - before).abs().max() > 0.05
    torch.testing.assert_close(encode(cut, texts()), after)


def test_modules_behind_the_table_and_the_similarity_stay():
    model = table(Normalize())
    model.similarity_fn_name = "dot"
    cut = only_used_rows(model, texts())
    assert cut.similarity_fn_name == "dot"
    assert torch.equal(encode(cut, texts()), encode(model, texts()))


def test_a_copy_shares_the_tokens_and_not_the_weights():
    cut = only_used_rows(table(), texts())
    other = copy.deepcopy(cut)
    assert other[0].known is cut[0].known
    with torch.no_grad():
        other[0].embedding.weight.add_(1)
    assert not torch.equal(encode(cut, texts()[:1]), encode(other, texts()[:1]))


def test_a_prompt_is_part_of_the_text_and_other_texts_are_refused():
    model, text = table(), "bababeba bebe"
    model.prompts = {"query": "gaga "}
    cut = only_used_rows(model, [f"gaga {text}"])
    cut.prompts = model.prompts
    assert torch.equal(encode(cut, [text]), encode(model, [text]))
    with pytest.raises(ValueError, match="cut to the texts of a collection, and 'bababeba"):
        encode(cut, [text], side="document")


def test_the_guided_loss_of_sentence_transformers_takes_it_and_not_the_whole_table():
    model = table()
    with pytest.raises(ValueError, match="PreTrainedTokenizer"):
        GISTEmbedLoss(model, copy.deepcopy(model))
    cut = only_used_rows(model, texts())
    loss = GISTEmbedLoss(cut, copy.deepcopy(cut))
    some = texts()
    columns = [cut.preprocess(some[i : i + 4]) for i in (0, 4, 8)]
    assert loss(columns, None).isfinite()


def test_a_model_without_a_table_stays_as_it_is():
    model = tiny_encoder()
    assert only_used_rows(model, texts()) is model

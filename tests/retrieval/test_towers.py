"""Two encoders of one model: what they share, and the one model that they are saved as."""

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from peft import LoraConfig
from sentence_transformers import SentenceTransformer

from negtune.retrieval.encoder import load_encoder
from negtune.retrieval.towers import join_towers, query_copy, split_towers
from tests.retrieval.tiny_rankers import bi_encoder, needs_adapters, static_encoder

TEXTS = ["w1 w2 w3", "w4", "w5 w6"]


def same(first, second):
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_what_moves_in_a_copy_does_not_move_in_the_model(tmp_path):
    model = bi_encoder(tmp_path / "model")
    before, made = model.encode(TEXTS), query_copy(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.5)
    assert np.array_equal(model.encode(TEXTS), before)
    assert not np.allclose(made.encode(TEXTS), before)


def test_a_copy_shares_what_is_not_trained(tmp_path):
    model = bi_encoder(tmp_path / "model")
    frozen = model[0].model.embeddings.word_embeddings.weight
    frozen.requires_grad_(False)
    shared = {p.data_ptr() for p in model.parameters()}
    in_common = [p.data_ptr() in shared for p in query_copy(model).parameters()]
    assert sum(in_common) == 1
    assert query_copy(model)[0].model.embeddings.word_embeddings.weight is frozen
    adapted = query_copy(model, adapter=True)
    assert all(p.data_ptr() in shared for p in adapted.parameters())
    adapted.requires_grad_(False)  # as an adapter does
    assert sum(p.requires_grad for p in model.parameters()) == len(in_common) - 1


def two_models(folder):
    query, document = (bi_encoder(folder / name) for name in ("query", "document"))
    with torch.no_grad():
        query[0].model.embeddings.word_embeddings.weight.add_(1.0)
    query.prompts, document.prompts = {"query": "w9 ", "document": "w8 "}, {"document": "w7 w6 "}
    query.max_seq_length, document.max_seq_length = 4, 5
    for model in (query, document):
        model.similarity_fn_name = "dot"
    return query, document


def test_joined_towers_encode_as_each_of_them_and_load_without_code_of_ours(tmp_path):
    query, document = two_models(tmp_path)
    join_towers(query, document).save_pretrained(str(tmp_path / "both"))
    again = SentenceTransformer(str(tmp_path / "both"), device="cpu")
    for model in (again, load_encoder(tmp_path / "both", device="cpu")):
        same(model.encode_query(TEXTS), query.encode_query(TEXTS))
        same(model.encode_document(TEXTS), document.encode_document(TEXTS))
        assert model.similarity_fn_name == "dot"
    assert not np.allclose(query.encode_query(TEXTS), document.encode_document(TEXTS))


def test_towers_come_apart_again(tmp_path):
    query, document = two_models(tmp_path)
    first, second = split_towers(join_towers(query, document))
    same(first.encode_query(TEXTS), query.encode_query(TEXTS))
    same(second.encode_document(TEXTS), document.encode_document(TEXTS))
    assert first.similarity_fn_name == "dot"
    model = static_encoder()
    assert split_towers(model) == (model, model)


@needs_adapters
def test_an_adapter_is_merged_into_a_copy(tmp_path):
    document = bi_encoder(tmp_path / "model")
    query = query_copy(document, adapter=True)
    query.add_adapter(LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False))
    expected, plain = query.encode_query(TEXTS), document.encode_document(TEXTS)
    assert not np.allclose(expected, plain, atol=1e-3)
    both = join_towers(query, document)
    assert not [name for name, _ in both.named_parameters() if "lora" in name]
    both.save_pretrained(str(tmp_path / "both"))
    again = SentenceTransformer(str(tmp_path / "both"), device="cpu")
    np.testing.assert_allclose(again.encode_query(TEXTS), expected, atol=1e-5)
    same(again.encode_document(TEXTS), plain)
    same(query.encode_query(TEXTS), expected)
    assert [name for name, _ in query.named_parameters() if "lora" in name]
    query[0].model.is_quantized = True
    with pytest.raises(ValueError, match="merging an adapter into quantised weights would round it away"):
        join_towers(query, document)

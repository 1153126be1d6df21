"""Causal LMs that answer yes or no, and models by name."""

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from sentence_transformers import CrossEncoder

from negtune.models.load import load_model
from negtune.models.tiny import tiny_tokenizer
from negtune.retrieval.rankers import causal_reranker, load_ranker, pair_template

PAIRS = [("w1", "some text"), ("w1 w2", "another, longer text {{ with }} braces")]


@pytest.fixture(scope="module")
def reranker():
    return causal_reranker("tiny", instruction='Say "a" or "b".', yes="a", no="b", max_length=128)


def test_the_score_is_the_difference_of_two_logits_behind_the_whole_prompt(reranker):
    model, tokenizer = load_model("tiny")
    scores = reranker.predict(PAIRS, activation_fn=torch.nn.Identity())
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in "ab")
    for (query, document), score in zip(PAIRS, scores, strict=True):
        text = f'Say "a" or "b".\n\nQuery: {query}\n\nDocument: {document}'
        turn = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        logits = model(**ids).logits[0, -1]
        assert score == pytest.approx((logits[yes] - logits[no]).item(), abs=1e-5)


def test_padding_in_a_batch_changes_no_score(reranker):
    together = reranker.predict(PAIRS)
    alone = [reranker.predict([pair])[0] for pair in PAIRS]
    assert together == pytest.approx(alone, abs=1e-6)


def test_a_long_document_is_cut_and_what_follows_it_is_not(reranker):
    features = reranker.preprocess([("w1", "long " * 200)])
    assert features["input_ids"].shape[1] <= 128
    text = reranker.tokenizer.decode(features["input_ids"][0])
    short = reranker.tokenizer.decode(reranker.preprocess([("w1", "x")])["input_ids"][0])
    behind = short[short.index("Document: x") + len("Document: x") :]
    assert text.rstrip().endswith(behind.rstrip())
    assert "Query: w1" in text


def test_it_is_saved_as_an_ordinary_cross_encoder(reranker, tmp_path):
    reranker.save_pretrained(str(tmp_path))
    again = CrossEncoder(str(tmp_path), device="cpu")
    assert again.predict(PAIRS) == pytest.approx(reranker.predict(PAIRS), abs=1e-6)


def test_without_a_chat_template_the_prompt_is_plain_text():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.chat_template = pair_template(tokenizer, "Relevant?")
    messages = [{"role": "query", "content": "q"}, {"role": "document", "content": "d"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "Relevant?\n\nQuery: q\n\nDocument: d\nAnswer: "


def test_answers_that_cannot_be_read_off_are_refused():
    with pytest.raises(ValueError, match="is .* tokens; choose one that is a single token"):
        causal_reranker("tiny", yes="yes indeed", no="b")
    with pytest.raises(ValueError, match="'a' and 'a' are the same token"):
        causal_reranker("tiny", yes="a", no="a")


def test_rankers_by_name(tmp_path):
    from tests.retrieval.tiny_rankers import bert_folder

    folder = bert_folder(tmp_path / "bert")
    assert type(load_ranker("tiny")).__name__ == "SentenceTransformer"
    assert type(load_ranker(folder, "multi_vector")).__name__ == "MultiVectorEncoder"
    assert type(load_ranker(bert_folder(tmp_path / "cross", labels=1), "cross_encoder")).__name__ == "CrossEncoder"
    assert type(load_ranker("tiny", "causal_lm", answers=("a", "b"))).__name__ == "CrossEncoder"
    with pytest.raises(ValueError, match="unknown kind of model 'encoder'"):
        load_ranker("tiny", "encoder")

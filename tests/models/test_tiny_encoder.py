import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F

from negtune.data.retrieval import SYNTHETIC_WORDS, split_queries, synthetic_retrieval
from negtune.models import ModelError, tiny_encoder
from negtune.models.tiny_encoder import word_tokenizer

needs_host = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None,
    reason=f"needs sentence-transformers: {tiny_encoder.INSTALL}",
)


def test_each_synthetic_word_is_one_token_and_others_are_spelled():
    tokenizer = word_tokenizer()
    assert [len(ids) for ids in tokenizer(list(SYNTHETIC_WORDS), add_special_tokens=False)["input_ids"]] == [1] * 1600
    assert tokenizer.tokenize("Bada cat 3!") == ["bada", "c", "##a", "##t", "3", "[UNK]"]
    assert tokenizer.decode(tokenizer("bada", "lusa")["input_ids"]) == "[CLS] bada [SEP] lusa [SEP]"
    assert tokenizer("bada", "lusa")["token_type_ids"] == [0, 0, 0, 1, 1]


@needs_host
def test_equal_seeds_give_equal_weights_and_leave_the_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    first, again, other = tiny_encoder.tiny_encoder(1), tiny_encoder.tiny_encoder(1), tiny_encoder.tiny_encoder(2)
    cross = tiny_encoder.tiny_cross_encoder(1)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, one), two in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert not torch.equal(
        first[0].auto_model.embeddings.word_embeddings.weight, other[0].auto_model.embeddings.word_embeddings.weight
    )
    pairs = [("bada", "lusa"), ("bada", "lusa mobo")]
    assert cross.predict(pairs).shape == (2,)
    assert (cross.predict(pairs) == tiny_encoder.tiny_cross_encoder(1).predict(pairs)).all()


@needs_host
def test_a_vector_is_the_mean_of_all_states():
    model = tiny_encoder.tiny_encoder()
    states = model.encode("bada lusa", output_value="token_embeddings")
    assert states.shape == (4, 32)
    torch.testing.assert_close(torch.as_tensor(model.encode("bada lusa")), states.mean(0))


@needs_host
def test_both_come_back_from_their_folders(tmp_path):
    from sentence_transformers import CrossEncoder, SentenceTransformer

    texts, pairs = ["bada lusa", "mobo"], [("bada", "lusa"), ("bada", "mobo")]
    folder = tiny_encoder.save_tiny_encoder(tmp_path / "bi", seed=3)
    assert (SentenceTransformer(str(folder)).encode(texts) == tiny_encoder.tiny_encoder(3).encode(texts)).all()
    folder = tiny_encoder.save_tiny_cross_encoder(tmp_path / "cross", seed=3)
    assert (CrossEncoder(str(folder)).predict(pairs) == tiny_encoder.tiny_cross_encoder(3).predict(pairs)).all()


@needs_host
def test_what_it_learns_from_some_synthetic_queries_holds_for_new_ones():
    train, test = split_queries(synthetic_retrieval(), 0.5, seed=0)
    model, places = tiny_encoder.tiny_encoder(), {d: i for i, d in enumerate(train.corpus)}

    def vectors(texts):
        features = model.preprocess(list(texts))
        return F.normalize(model(features)["sentence_embedding"], dim=1)

    def share_of_relevant_in_the_first_ten():
        with torch.no_grad():
            best = (vectors(test.queries.values()) @ vectors(test.corpus.values()).T).topk(10).indices
        relevant = [{places[d] for d in test.positives(query_id)} for query_id in test.queries]
        return sum(len(set(row.tolist()) & wanted) for row, wanted in zip(best, relevant, strict=True)) / best.numel()

    target = torch.zeros(len(train.queries), len(train.corpus))
    for row, query_id in enumerate(train.queries):
        for document_id, gain in train.positives(query_id).items():
            target[row, places[document_id]] = gain
    target /= target.sum(1, keepdim=True)
    before, optimizer = share_of_relevant_in_the_first_ten(), torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        scores = 10 * vectors(train.queries.values()) @ vectors(train.corpus.values()).T
        loss = -(target * scores.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.6
    assert share_of_relevant_in_the_first_ten() > before + 0.2


@pytest.mark.parametrize("build", [tiny_encoder.tiny_encoder, tiny_encoder.tiny_cross_encoder])
def test_without_sentence_transformers_the_error_names_the_command(build, monkeypatch):
    for name in ("sentence_transformers", "sentence_transformers.sentence_transformer.modules"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelError, match=r"not installed; run: pip install 'negtune\[retrieval\]'"):
        build()

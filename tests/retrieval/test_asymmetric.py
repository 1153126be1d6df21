"""What is in what: sums of words, means that shrink, learned magnitudes in the stock trainer, search both ways."""

import json
import math
import random
import warnings

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import (
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
    WordEmbeddings,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

from negtune.losses.asymmetric import asymmetric_similarity, containment_filter, norm_ratio
from negtune.metrics.ranking import micro_ap
from negtune.models.tiny_encoder import tiny_encoder
from negtune.retrieval.asymmetric import MagnitudeHead, NormRatioLoss, add_magnitude, search_pairs
from negtune.retrieval.encoder import causal_encoder, encode, load_encoder
from tests.retrieval.tiny_rankers import WORDS, bert_folder, bi_encoder, static_encoder

PROBES = ["w1", "w2 w3 w4", "w5 w6 w7 w8 w9 w10 w11 w12"]
EMPTY, CONTENT = WORDS[:20], WORDS[20:]


def mean_of_words():
    """A mean of word vectors, which can be trained and give the states of its tokens."""
    torch.manual_seed(0)
    words = WordEmbeddings(WhitespaceTokenizer(WORDS, stop_words=set()), torch.randn(201, 32), update_embeddings=True)
    return SentenceTransformer(modules=[words, Pooling(32, "mean")], device="cpu")


def wholes_and_parts(n, seed, *, least=2, padded=False):
    """Eight to twelve words, and `least` to five of them; `padded` by empty words: then the part is the longer text."""
    draw, made = random.Random(seed), []
    for _ in range(n):
        whole = draw.sample(CONTENT, draw.randint(8, 12))
        part = draw.sample(whole, draw.randint(least, 5))
        part += [draw.choice(EMPTY) for _ in range(13 - len(part))] if padded else []
        made.append({"smaller": " ".join(draw.sample(part, len(part))), "larger": " ".join(whole)})
    return made


def sides(model, made):
    return (encode(model, [row[side] for row in made]) for side in ("smaller", "larger"))


def direction_accuracy(model, made):
    """Share of pairs in which the larger text has the larger norm."""
    smaller, larger = sides(model, made)
    return (larger.norm(dim=1) > smaller.norm(dim=1)).float().mean().item()


def average_precision(smaller, larger, *, filtered=False, weight=0.0):
    """Of pairs one way round, which are right, and other pairs the other way round, which are wrong."""
    half = len(smaller) // 2
    queries = torch.cat([smaller[:half], larger[half:]])
    documents = torch.cat([larger[:half], smaller[half:]])
    scores = asymmetric_similarity(queries, documents, weight=weight).diagonal()
    labels = (torch.arange(2 * half) < half).float()
    kept = containment_filter(queries, documents).diagonal() if filtered else torch.ones(2 * half, dtype=torch.bool)
    return micro_ap(scores[kept].tolist(), labels[kept].tolist(), half)


def trained(folder, model, made, *, epochs=4, learning_rate=1e-2, **settings):
    """By the stock trainer; what it logged."""
    from datasets import Dataset

    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        **{"num_train_epochs": epochs, "per_device_train_batch_size": 32, "learning_rate": learning_rate},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10, "use_cpu": True},
    )
    loss = NormRatioLoss(model, probes=PROBES, **settings)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=Dataset.from_list(made), loss=loss)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def with_noise(model):
    """A head that has learned something."""
    torch.nn.init.normal_(model[-1].content.weight, std=0.5)
    torch.nn.init.normal_(model[-1].content.bias)
    return model


# --- Sums, means and magnitudes ---------------------------------------------------------------------------------------


def test_a_sum_of_words_needs_the_filter_alone():
    """600 queries in their documents, 600 that contain them: the same cosines, told apart by norms."""
    table, made = torch.randn(200, 200), wholes_and_parts(1200, seed=3)

    def total(texts):
        return torch.stack([table[[int(word[1:]) for word in text.split()]].sum(0) for text in texts])

    smaller, larger = (total([row[side] for row in made]) for side in ("smaller", "larger"))
    assert average_precision(smaller, larger) == pytest.approx(0.5, abs=0.05)
    assert average_precision(smaller, larger, filtered=True) >= 0.99
    assert 0.9 < average_precision(smaller, larger, weight=1.0) < average_precision(smaller, larger, weight=3.0)


def test_a_mean_of_words_cannot_be_taught_and_a_magnitude_tells_at_once(tmp_path):
    """The mean of more words is shorter, whatever vectors they have: by convexity on average over the parts."""
    made, held_out = wholes_and_parts(1000, seed=1), wholes_and_parts(1200, seed=9)
    plain, headed = mean_of_words(), add_magnitude(mean_of_words())
    for model in (plain, headed):
        log = trained(tmp_path, model, made)
        assert log[-1]["contrastive"] < log[0]["contrastive"] - 0.1
    assert direction_accuracy(plain, held_out) <= 0.1
    assert direction_accuracy(headed, held_out) >= 0.95
    assert average_precision(*sides(plain, held_out), filtered=True) < 0.2
    assert average_precision(*sides(headed, held_out)) == pytest.approx(0.5, abs=0.05)
    assert average_precision(*sides(headed, held_out), filtered=True) >= 0.95
    assert average_precision(*sides(headed, held_out), weight=1.0) >= 0.95


def test_the_stock_trainer_teaches_which_words_hold_something(tmp_path):
    """The part is the longer text here: a count of tokens has it the wrong way round in every pair."""
    model = add_magnitude(bi_encoder(tmp_path / "model"))
    made, held_out = wholes_and_parts(500, seed=1, padded=True), wholes_and_parts(200, seed=9, padded=True)
    assert direction_accuracy(model, held_out) == 0
    log = trained(tmp_path / "run", model, made, epochs=6)
    assert direction_accuracy(model, held_out) >= 0.95
    assert log[-1]["norm_ratio"] < 0.3 < 1 < log[0]["norm_ratio"]
    assert log[-1]["contrastive"] < log[0]["contrastive"] - 0.5


def test_a_margin_stops_where_norms_are_far_enough_apart(tmp_path):
    made, held_out = wholes_and_parts(500, seed=1, padded=True), wholes_and_parts(200, seed=9, padded=True)
    ratios = {}
    for margin in (None, 1.2):
        model = add_magnitude(mean_of_words())
        trained(tmp_path, model, made, epochs=12, learning_rate=3e-2, margin=margin)
        smaller, larger = sides(model, held_out)
        ratios[margin] = (larger.norm(dim=1) / smaller.norm(dim=1)).median().item()
    assert 1.2 < ratios[1.2] < 0.8 * ratios[None]


# --- The loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_in_batch_negatives_and_the_norm_ratio(tmp_path):
    model = with_noise(add_magnitude(bi_encoder(tmp_path)))
    made = wholes_and_parts(6, seed=0)
    columns = [model.preprocess([row[side] for row in made]) for side in ("smaller", "larger")]
    found = NormRatioLoss(model, weight=0.3, margin=4.0, scale=10.0, probes=PROBES)([dict(c) for c in columns])
    its = MultipleNegativesRankingLoss(model, scale=10.0)([dict(c) for c in columns], None)
    torch.testing.assert_close(found["contrastive"], its)
    smaller, larger = sides(model, made)
    torch.testing.assert_close(found["norm_ratio"], 0.3 * norm_ratio(larger, smaller, margin=4.0).mean())


def test_constant_norms_are_refused_and_a_magnitude_is_the_way_out(tmp_path):
    folder = bert_folder(tmp_path)

    def encoder(pooling, *more):
        return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(32, pooling), *more], device="cpu")

    for model, why in (
        (encoder("mean", Normalize()), "ends in Normalize"),
        (encoder("mean", LayerNorm(32)), "as after a LayerNorm"),
        (encoder("cls"), "as after a LayerNorm"),
    ):
        with pytest.raises(ValueError, match=rf"{why}: nothing to train; add_magnitude\(model\) gives it norms"):
            NormRatioLoss(model.train())
        assert model.training
        NormRatioLoss(add_magnitude(model))
    NormRatioLoss(encoder("mean"))
    # words that the encoder does not have are all one to it
    with pytest.raises(ValueError, match=r"if it lacks the words of the probes, pass probes="):
        NormRatioLoss(mean_of_words())
    # nor can a magnitude tell texts that are cut at one length
    model = add_magnitude(encoder("mean"))
    model.max_seq_length = 3
    with pytest.raises(ValueError, match=r"cut at max_seq_length: nothing to train"):
        NormRatioLoss(model)


def test_what_cannot_be_meant_is_refused(tmp_path):
    model = add_magnitude(bi_encoder(tmp_path))
    for settings, said in (
        ({"weight": -1.0}, "weight must be at least 0 and finite, got -1.0"),
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"margin": 0.0}, "margin is a ratio of norms, positive and finite, got 0.0"),
    ):
        with pytest.raises(ValueError, match=said):
            NormRatioLoss(model, **settings)
    with pytest.raises(ValueError, match="need two columns, the smaller and the larger text, got 3"):
        NormRatioLoss(model)([{}, {}, {}])
    with pytest.raises(ValueError, match="has a MagnitudeHead already"):
        add_magnitude(model)
    with pytest.raises(ValueError, match="states of tokens, which StaticEmbedding does not give"):
        add_magnitude(static_encoder())


# --- The head ---------------------------------------------------------------------------------------------------------


def test_a_magnitude_leaves_cosines_as_they_are_and_begins_as_the_number_of_tokens():
    texts = ["a cat", "a cat sat on a mat"]
    model = tiny_encoder()
    model.append(Normalize())
    model.similarity_fn_name = "dot"
    before = encode(model, texts)
    assert add_magnitude(model.train()) is model
    assert model.training
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "MagnitudeHead"]
    assert model.similarity_fn_name == "cosine"
    after = encode(model, texts)
    torch.testing.assert_close(torch.nn.functional.normalize(after), before)
    tokens = model.preprocess(texts)["attention_mask"].sum(1)
    torch.testing.assert_close(after.norm(dim=1), tokens * math.log(2))
    assert model.get_embedding_dimension() == 32


def by_hand():
    """softplus(w . t + b) of tokens (1, 0), (0, 2), (3, 0) with w = (1, -1), b = 0.5."""
    head = MagnitudeHead(2)
    with torch.no_grad():
        head.content.weight.copy_(torch.tensor([[1.0, -1.0]]))
        head.content.bias.fill_(0.5)
    tokens = torch.tensor([[1.0, 0], [0, 2], [3, 0]])
    return head, tokens, [math.log1p(math.exp(x)) for x in (1.5, -1.5, 3.5)]


@pytest.mark.parametrize("nonsense", [99.0, -99.0, float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sum_over_tokens_by_hand_with_nonsense_behind_the_mask_on_either_side(side, nonsense):
    head, tokens, each = by_hand()
    states, mask = torch.full((2, 5, 2), nonsense), torch.zeros(2, 5, dtype=torch.long)
    start = {"left": (2, 4), "right": (0, 0)}[side]
    states[0, start[0] : start[0] + 3], mask[0, start[0] : start[0] + 3] = tokens, 1
    states[1, start[1]], mask[1, start[1]] = tokens[2], 1
    states.requires_grad_()
    directions = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
    found = head({"token_embeddings": states, "attention_mask": mask, "sentence_embedding": directions})
    wanted = torch.tensor([[0.6, 0.8], [0, -1]]) * torch.tensor([[sum(each)], [each[2]]])
    torch.testing.assert_close(found["sentence_embedding"], wanted)
    found["sentence_embedding"].norm(dim=1).sum().backward()
    assert (states.grad[mask == 0] == 0).all()
    assert head.content.weight.grad.isfinite().all()
    assert (states.grad[mask == 1][:, 0] > 0).all()


def test_texts_in_one_row_are_summed_apart():
    head, tokens, each = by_hand()
    features = {
        "token_embeddings": tokens[None],
        "cu_seq_lens_q": torch.tensor([0, 1, 3], dtype=torch.int32),
        "sentence_embedding": torch.tensor([[3.0, 4.0], [0.0, -2.0]]),
    }
    norms = head(features)["sentence_embedding"].norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([each[0], each[1] + each[2]]))


@pytest.mark.parametrize("side", ["left", "right", "one row"])
@pytest.mark.parametrize("length", [1, torch.tensor([1]), torch.tensor([1, 1])])
def test_a_prompt_counts_for_nothing(side, length):
    head, tokens, each = by_hand()
    features = {"sentence_embedding": torch.tensor([[3.0, 4.0], [0.0, -2.0]]), "prompt_length": length}
    if side == "one row":
        features |= {"token_embeddings": tokens[None, [0, 1, 2, 1, 2]], "cu_seq_lens_q": torch.tensor([0, 3, 5])}
    else:
        short = [0, 1, 2] if side == "left" else [1, 2, 0]
        mask = torch.tensor([[1, 1, 1], [0, 1, 1] if side == "left" else [1, 1, 0]])
        features |= {"token_embeddings": tokens[torch.tensor([[0, 1, 2], short])], "attention_mask": mask}
    norms = head(features)["sentence_embedding"].norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([each[1] + each[2], each[2]]))


def test_a_model_with_a_prompt_holds_what_its_text_holds(tmp_path):
    """The states see the prompt, so the directions change; the count does not, but for [CLS], which goes with it."""
    model = add_magnitude(bi_encoder(tmp_path / "model"))
    plain, short, long = (model.encode(["w1 w2 w3"], prompt=prompt)[0] for prompt in (None, "w9 ", "w9 w8 w7 w6 "))
    norms = [float(torch.tensor(vector).norm()) / math.log(2) for vector in (plain, short, long)]
    assert norms == pytest.approx([5, 4, 4], abs=1e-4)


def test_mixed_precision_does_not_reach_the_sum():
    head, tokens, _ = by_hand()
    features = {"token_embeddings": tokens.repeat(1, 1, 1).expand(1, 3, 2), "attention_mask": torch.ones(1, 3)}
    plain = head({**features, "sentence_embedding": torch.ones(1, 2)})["sentence_embedding"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head({**features, "sentence_embedding": torch.ones(1, 2)})["sentence_embedding"]
    assert torch.equal(mixed, plain)
    half = head.to(torch.bfloat16)({**features, "sentence_embedding": torch.ones(1, 2, dtype=torch.bfloat16)})
    assert half["sentence_embedding"].dtype == torch.float32


def test_neither_the_batch_nor_the_padding_side_changes_a_vector(tiny_folder):
    texts = ["a cat", "a cat sat on a mat and looked at the rain", "the rain"]
    heads = []
    for side in ("left", "right"):
        model = causal_encoder(tiny_folder, padding_side=side, device="cpu")
        torch.manual_seed(0)
        model = with_noise(add_magnitude(model))
        together = encode(model, texts)
        alone = torch.cat([encode(model, [text]) for text in texts])
        torch.testing.assert_close(together, alone)
        assert (together.norm(dim=1).diff().abs() > 0.1).all()
        heads.append(together)
    torch.testing.assert_close(*heads)


def test_a_saved_magnitude_is_read_again(tmp_path):
    model = with_noise(add_magnitude(tiny_encoder()))
    texts = ["a cat", "a cat sat on a mat"]
    model.save_pretrained(str(tmp_path), create_model_card=False)
    saved = tmp_path / "2_MagnitudeHead"
    assert {path.name for path in saved.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((saved / "config.json").read_text()) == {"width": 32}
    for loaded in (load_encoder(tmp_path, device="cpu"), SentenceTransformer(str(tmp_path), trust_remote_code=True)):
        assert isinstance(loaded[-1], MagnitudeHead)
        assert loaded.similarity_fn_name == "cosine"
        assert torch.equal(encode(loaded, texts), encode(model, texts))


# --- Search -----------------------------------------------------------------------------------------------------------


def all_pairs(queries, documents, k, threshold, weight, ratio):
    """What `search_pairs` should find, from whole matrices: scores by (query, document, query_inside)."""
    found = {}
    for inside in (True, False):
        small, large = (queries, documents) if inside else (documents, queries)
        scores = asymmetric_similarity(small, large, weight=weight)
        if ratio is not None:
            scores = scores.masked_fill(~containment_filter(small, large, ratio=ratio), -math.inf)
        scores = scores if inside else scores.T
        for row, places in enumerate(scores.sort(descending=True).indices[:, :k].tolist()):
            for place in places:
                if scores[row, place] > -math.inf and scores[row, place] >= threshold:
                    found[row, place, inside] = scores[row, place].item()
    return found


def by_pair(pairs):
    parts = (pairs.queries, pairs.documents, pairs.query_inside)
    rows = list(zip(*(part.tolist() for part in parts), strict=True))
    assert len(set(rows)) == len(rows)
    assert pairs.scores.tolist() == sorted(pairs.scores.tolist(), reverse=True)
    return dict(zip(rows, pairs.scores.tolist(), strict=True))


@pytest.mark.parametrize(("weight", "ratio"), [(0.0, None), (1.0, None), (0.0, 1.0), (0.3, 1.2)])
@pytest.mark.parametrize(("k", "threshold"), [(1, -math.inf), (4, -math.inf), (60, 0.2)])
def test_pairs_are_those_of_whole_matrices(k, threshold, weight, ratio):
    queries, documents = torch.randn(30, 8), torch.randn(60, 8) * torch.rand(60, 1)
    settings = {"k": k, "threshold": threshold, "weight": weight, "ratio": ratio}
    found = search_pairs(queries, documents, **settings, candidates=60, max_bytes=2**12)
    wanted = all_pairs(queries, documents, **settings)
    assert by_pair(found) == pytest.approx(wanted, abs=1e-5)
    assert len(wanted) > 20


def test_search_finds_both_directions_of_sums_of_words():
    """Each query is in one document or has one in it, and has 399 strangers."""
    table, made = torch.randn(200, 200), wholes_and_parts(400, seed=3, least=4)
    smaller, larger = (
        torch.stack([table[[int(word[1:]) for word in row[side].split()]].sum(0) for row in made])
        for side in ("smaller", "larger")
    )
    queries = torch.cat([smaller[:200], larger[200:]])
    documents = torch.cat([larger[:200], smaller[200:]])
    found = search_pairs(queries, documents, k=1, weight=0.0, ratio=1.0)
    true = {(i, i, i < 200) for i in range(400)}
    first = zip(found.queries.tolist(), found.documents.tolist(), found.query_inside.tolist(), strict=True)
    # of each query the right document the right way round, and somebody else the other way round
    assert len(true & set(first)) >= 380
    labels = (found.queries == found.documents) & (found.query_inside == (found.queries < 200))
    assert micro_ap(found.scores.tolist(), labels.tolist(), 400) >= 0.9


def test_too_few_candidates_are_told_of():
    queries, documents = torch.ones(3, 2), torch.ones(50, 2)
    with pytest.warns(UserWarning, match=r"3 of 3 queries may have pairs above 0\.5 beyond their 10 candidates"):
        search_pairs(queries, documents, threshold=0.5, candidates=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search_pairs(queries, documents, threshold=0.5, candidates=50)
        search_pairs(queries, documents, candidates=10)
        # nine documents above the threshold, the tenth candidate below it
        search_pairs(queries, torch.cat([documents[:9], -documents]), threshold=0.5, candidates=10)
    with pytest.raises(ValueError, match="k counts pairs of a query and must be at least 1, got 0"):
        search_pairs(queries, documents, k=0)
    with pytest.raises(ValueError, match="threshold is the least score of a pair, got nan"):
        search_pairs(queries, documents, threshold=float("nan"))


def test_zero_vectors_are_in_everything_and_nothing_is_in_them():
    zero, other = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    found = search_pairs(zero, other, weight=0.0, ratio=1.0)
    assert (found.query_inside.tolist(), found.scores.tolist()) == ([True], [0.0])
    assert search_pairs(other, zero, weight=0.0, ratio=1.0).query_inside.tolist() == [False]

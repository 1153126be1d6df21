"""Documents shared by a batch: what is no negative by the judgements, duplicates, GradCache, the host's own trainer."""

import random

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch.nn.functional import softplus

from negtune.data.candidates import candidate_rows
from negtune.data.completions import RowError
from negtune.losses.ranking import RANKING_LOSSES
from negtune.retrieval.collate import CandidateCollator
from negtune.retrieval.in_batch import pooled, to_columns
from negtune.retrieval.losses import Lists, RankingLoss
from tests.retrieval.test_losses import assert_same, gradients
from tests.retrieval.tiny_rankers import WORDS, bi_encoder, cross_encoder, multi_vector, rows, static_encoder

CORPUS = {f"d{i}": f"{WORDS[3 * i]} {WORDS[3 * i + 1]} {WORDS[3 * i + 2]}" for i in range(12)}
CORPUS["twin"] = CORPUS["d0"].replace(" ", "  ")
QUERIES = ["w100 w101", "w102", "w100  w101", "w103 w104 w105", "w106 w107"]


def judged_rows(seed=0, *, ids=True):
    """Lists of unequal length that share documents. Two queries are equal; each knows relevant documents elsewhere."""
    draw = random.Random(seed)
    made = []
    for i, query in enumerate(QUERIES):
        own = draw.sample(sorted(CORPUS), 5 - i % 2)
        if {"d0", "twin"} <= set(own):
            own.remove("twin")
        known = own[:2] + draw.sample(sorted(set(CORPUS) - set(own) - {"d0", "twin"}), 3)
        gains = [2.0, 1.0, *[0.0] * (len(own) - 2)]
        order = draw.sample(range(len(own)), len(own))
        made.append(
            {
                "query": query,
                "documents": [CORPUS[own[j]] for j in order],
                "gains": [gains[j] for j in order],
                "known_positives": known if ids else [CORPUS[d] for d in known],
                **({"document_ids": [own[j] for j in order]} if ids else {}),
            }
        )
    return made


def key(text):
    return " ".join(text.split())


def by_judgement(made):
    """Candidates of each query by hand: {text: gain}, own gains first, nothing else that is relevant; and own texts."""
    found = []
    for row in made:
        relevant = set()
        for other in made:
            if key(other["query"]) == key(row["query"]):
                relevant |= {key(CORPUS.get(name, name)) for name in other["known_positives"]}
                relevant |= {key(d) for d, g in zip(other["documents"], other["gains"], strict=True) if g > 0}
        own = {key(d): g for d, g in zip(row["documents"], row["gains"], strict=True)}
        texts = dict.fromkeys(key(d) for other in made for d in other["documents"])
        found.append(
            {text: own.get(text, 0.0) for text in texts if own.get(text, 0.0) > 0 or text not in relevant}
            | {"own": set(own)}
        )
    return found


def cosines(model, made, candidates):
    """Scaled scores and gains of one list at a time."""
    for row, list_ in zip(made, candidates, strict=True):
        texts = [text for text in list_ if text != "own"]
        query, documents = (model.encode(part, convert_to_tensor=True) for part in ([row["query"]], texts))
        gains = torch.tensor([[list_[text] for text in texts]])
        yield 5 * model.similarity(query, documents), gains, [text in list_["own"] for text in texts]


# --- Masks by the judgements ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("loss_type", ["infonce", "masked_infonce", "lambda_rank", "list_net"])
def test_every_objective_leaves_out_what_is_known_to_be_relevant(loss_type, ids):
    model = static_encoder().eval()
    objective = RANKING_LOSSES[loss_type.removeprefix("masked_")]
    seen = 0
    for seed in range(5):
        made = judged_rows(seed, ids=ids)
        loss = RankingLoss(model, loss_type, scale=5.0, in_batch=True)
        found = loss(*batch_in_batch(model, loss, made))
        candidates = by_judgement(made)
        seen += sum(len(one) - 1 for one in candidates)
        expected = [
            objective(s, g, torch.ones_like(g, dtype=torch.bool)) for s, g, _ in cosines(model, made, candidates)
        ]
        torch.testing.assert_close(found, torch.cat(expected).mean())
        withheld, queries = loss.take_metrics()["in_batch/withheld"]
        texts = {key(d) for row in made for d in row["documents"]}
        assert (withheld, queries) == (sum(len(texts) - len(one) + 1 for one in candidates), 5)
        assert withheld > 5
    assert seen > 100


def batch_in_batch(model, loss, made):
    batch = CandidateCollator(model.preprocess, loss.kind, in_batch=True)(made)
    return batch["features"], Lists(**batch["lists"])


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_star_is_the_mean_over_pairs_of_the_batch(alpha):
    """Two positives a query, so that all pairs count the same."""
    model = static_encoder().eval()
    made = judged_rows(3)
    sides = {True: [], False: []}
    for scores, gains, own in cosines(model, made, by_judgement(made)):
        for positive in scores[gains > 0]:
            for score, gain, is_own in zip(scores[0], gains[0], own, strict=True):
                if gain == 0:
                    sides[is_own].append(softplus(score - positive))
    static, others = (torch.stack(sides[own]) for own in (True, False))
    expected = torch.cat([static, others]).mean() if alpha is None else static.mean() + alpha * others.mean()
    loss = RankingLoss(model, "star", scale=5.0, **({} if alpha is None else {"alpha": alpha}))
    torch.testing.assert_close(loss(*batch_in_batch(model, loss, made)), expected)


def test_what_is_known_to_be_relevant_gets_no_gradient_from_the_query_that_knows():
    model = static_encoder()
    made = [
        {"query": "w1", "documents": ["w2", "w3"], "gains": [1.0, 0.0], "known_positives": ["w4"]},
        {"query": "w5", "documents": ["w4", "w6"], "gains": [0.0, 0.0], "known_positives": ["w9"]},
    ]
    for loss_type in ("star", "masked_infonce", "lambda_rank"):
        loss = RankingLoss(model, loss_type, in_batch=True)
        _, found = gradients(model, loss, made, collate=batch_in_batch)
        (table,) = found.values()
        moved = {word for word in ("w1", "w2", "w3", "w4", "w5", "w6") if table[1 + int(word[1:])].abs().sum() > 0}
        assert moved == {"w1", "w2", "w3", "w6"}
        made[0]["known_positives"] = ["w9"]
        table = next(iter(gradients(model, loss, made, collate=batch_in_batch)[1].values()))
        assert table[1 + 4].abs().sum() > 0
        made[0]["known_positives"] = ["w4"]


def test_equal_queries_share_what_is_relevant_without_being_told():
    model = static_encoder().eval()
    made = [{"query": "w1 w2", "documents": [d], "gains": [1.0]} for d in ("w3", "w4")]
    made.append({"query": "w5", "documents": ["w6"], "gains": [1.0]})
    loss = RankingLoss(model, "masked_infonce")
    features, lists = batch_in_batch(model, loss, made)
    assert lists.known.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert pooled(lists).mask.tolist() == [[True, False, True], [False, True, True], [True, True, True]]
    assert loss(features, lists).isfinite()


def test_documents_of_equal_text_are_embedded_once_and_count_once():
    model = static_encoder()
    made = [
        {"query": "w1", "documents": ["w2 w3", "w4"], "gains": [1.0, 0.0]},
        {"query": "w5", "documents": ["w6", " w2  w3"], "gains": [1.0, 0.0]},
    ]
    loss = RankingLoss(model, "star")
    features, lists = batch_in_batch(model, loss, made)
    assert len(features[1]["offsets"]) == 3
    assert lists.documents.tolist() == [[0, 1], [2, 0]]
    assert pooled(lists).gains.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert pooled(lists).own.tolist() == [[True, True, False], [True, False, True]]


def test_an_id_with_two_texts_is_refused_in_a_batch():
    made = [{**row, "document_ids": ["0", "1"], "known_positives": ["0"]} for row in rows(2, documents=2)]
    loss = RankingLoss(static_encoder(), "star")
    with pytest.raises(RowError, match="in one batch, document 0 has two texts; an id must be that of a document in"):
        batch_in_batch(loss.model, loss, made)


# --- GradCache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["star", "masked_infonce"])
@pytest.mark.parametrize("build", [bi_encoder, multi_vector])
def test_gradients_in_mini_batches_are_those_of_the_batch(tmp_path, build, loss_type):
    model = build(tmp_path / "model").train()
    made = judged_rows(1)
    whole = gradients(model, RankingLoss(model, loss_type), made, collate=batch_in_batch)
    for size in ({"mini_batch_size": 3}, {"mini_batch_num_tokens": 12}):
        parts = RankingLoss(model, loss_type, **size)
        assert_same(whole, gradients(model, parts, made, collate=batch_in_batch))


# --- sentence-transformers' own trainer -------------------------------------------------------------------------------


def features_of(model, table):
    return [model.preprocess([row[name] for row in table]) for name in table[0] if name != "label"]


def one_positive(made):
    """Without the second positive and what comes behind, which columns would repeat."""
    kept = []
    for row in made:
        pairs = list(zip(row["document_ids"], row["documents"], row["gains"], strict=True))
        pairs = [pair for pair in pairs if pair[2] != 1.0]
        ids, documents, gains = (list(side) for side in zip(*pairs, strict=True))
        kept.append({**row, "document_ids": ids, "documents": documents, "gains": [float(g > 0) for g in gains]})
    return kept


@pytest.mark.parametrize("cached", [None, 4])
@pytest.mark.parametrize("loss_type", ["star", "masked_infonce", "lambda_rank"])
def test_columns_with_ids_are_the_batch_of_rows(tmp_path, loss_type, cached):
    model = bi_encoder(tmp_path / "model").train()
    for seed in (0, 2):
        made = one_positive(judged_rows(seed))
        rows_loss = RankingLoss(model, loss_type, in_batch=True)
        wanted = gradients(model, rows_loss, made, collate=batch_in_batch)
        table = to_columns(made)
        labels = torch.tensor([row["label"] for row in table])
        loss = RankingLoss(model, loss_type, in_batch=True, label_ids=True, mini_batch_size=cached)
        model.zero_grad()
        value = loss(features_of(model, table), labels)
        value.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert_same(wanted, (value.detach(), found))
        assert loss.take_metrics()["in_batch/withheld"] == rows_loss.take_metrics()["in_batch/withheld"]


def test_columns_of_rows_hold_ids_and_padding():
    made = [
        {
            "query": "p",
            "documents": ["a", "b"],
            "gains": [1.0, 0.0],
            "document_ids": ["A", "B"],
            "known_positives": ["A", "C"],
        },
        {"query": "q", "documents": ["c", "a", "d"], "gains": [1.0, 0.0, 2.0], "document_ids": ["C", "A", "D"]},
        {"query": "r", "documents": ["a", "b", "c"], "gains": [0.0, 0.0, 1.0], "document_ids": ["A", "B", "C"]},
    ]
    assert to_columns(made) == [
        {"query": "p", "positive": "a", "negative_1": "b", "negative_2": "a", "label": [0, 1, -1, 0, 2]},
        {"query": "q", "positive": "c", "negative_1": "a", "negative_2": "c", "label": [2, 0, -1, 2, 3]},
        {"query": "q", "positive": "d", "negative_1": "a", "negative_2": "d", "label": [3, 0, -1, 2, 3]},
        {"query": "r", "positive": "c", "negative_1": "a", "negative_2": "b", "label": [2, 0, 1, 2, -1]},
    ]
    assert next(row["label"] for row in to_columns(made, n_negatives=0)) == [0, 0, 2]
    with pytest.raises(RowError, match="no query has a relevant document"):
        to_columns([{**made[0], "gains": [0.0, 0.0]}])


def test_columns_have_one_text_for_each_id():
    """Other white space may be other tokens, and one id with two texts is refused in a batch."""
    made = [{"query": q, "documents": ["a  b", f"n{q}"], "gains": [1.0, 0.0]} for q in "pq"]
    made[1]["documents"][0] = "a b"
    assert [row["positive"] for row in to_columns(made)] == ["a  b", "a  b"]
    with pytest.raises(ValueError, match="n_negatives must not be negative, got -1"):
        to_columns(made, n_negatives=-1)


@pytest.mark.parametrize(("ids", "known"), [(int, str), (str, int), (int, int)])
def test_ids_are_the_same_whatever_their_type(ids, known):
    """`Dataset.map` casts a column back to the type that it had."""
    made = [
        {"query": "p", "documents": ["a", "b"], "gains": [1, 0], "document_ids": [1, 2], "known_positives": [1, 3]},
        {"query": "q", "documents": ["c", "b"], "gains": [1, 0], "document_ids": [3, 2], "known_positives": [3]},
    ]
    for row in made:
        row["document_ids"] = [ids(name) for name in row["document_ids"]]
        row["known_positives"] = [known(name) for name in row["known_positives"]]
    checked = candidate_rows(Dataset.from_list(made), in_batch=True)
    model = static_encoder()
    lists = CandidateCollator(model.preprocess, "bi_encoder", in_batch=True)(list(checked))["lists"]
    assert pooled(Lists(**lists)).withheld.tolist() == [1, 0]


def test_a_row_that_is_masked_as_a_whole_has_no_candidates():
    model = static_encoder()
    lists = CandidateCollator(model.preprocess, "bi_encoder", in_batch=True)(judged_rows())["lists"]
    lists["mask"][-1] = False
    found = pooled(Lists(**lists))
    assert not found.mask[-1].any()
    assert found.mask[:-1].any(-1).all()
    assert found.withheld[-1] == 0


def test_padding_in_the_last_place_gathers_no_vectors():
    """Of 64 queries with 8 documents: `[B M H]` would be 64 times the vectors, of 4 bytes each."""
    labels = torch.ones(64, 8)
    labels[:, 1:] = 0
    labels[-1, -1] = -1
    loss = RankingLoss(static_encoder(), "masked_infonce")
    lists = pooled(Lists.of_labels(labels, 64, 8))
    vectors = torch.randn(512, 32, requires_grad=True)
    loss._scores([[torch.randn(64, 32)], [vectors]], lists).sum().backward()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        loss._scores([[torch.randn(64, 32)], [vectors]], lists)
    assert max(event.cpu_memory_usage for event in profiled.key_averages()) < 64 * 512 * 32


def test_padding_columns_are_no_candidates(tmp_path):
    model = bi_encoder(tmp_path / "model").eval()
    loss = RankingLoss(model, "star", label_ids=True)
    labels = torch.tensor([[0, 2, -1, 0], [1, 3, -1, 1]])

    def of(padding):
        return loss([model.preprocess(c) for c in (["w1", "w2"], ["w3", "w4"], ["w5", "w6"], padding)], labels)

    torch.testing.assert_close(of(["w7", "w8"]), of(["w3", "w9"]), rtol=0, atol=0)


def test_without_ids_documents_of_equal_tokens_count_once_and_equal_queries_share_positives(tmp_path):
    """Duplicate positives: in the host's own loss each is the other's negative."""
    model = bi_encoder(tmp_path / "model").train()
    texts = [("w1", "w3", "w6"), ("w2", "w3", "w7"), ("w1", "w4", "w5 w8")]
    made = [{"query": q, "documents": [p, n], "gains": [1.0, 0.0]} for q, p, n in texts]
    wanted = gradients(model, RankingLoss(model, "masked_infonce"), made, collate=batch_in_batch)
    for labels in (None, torch.tensor([[1, 0]] * 3)):
        model.zero_grad()
        features = [model.preprocess(list(column)) for column in zip(*texts, strict=True)]
        value = RankingLoss(model, "masked_infonce")(features, labels)
        value.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert_same(wanted, (value.detach(), found))


def test_a_negative_that_is_the_querys_positive_is_the_positive(tmp_path):
    model = bi_encoder(tmp_path / "model").eval()
    columns = [["w1", "w2"], ["w3", "w4"], ["w3", "w5"]]
    loss = RankingLoss(model, "masked_infonce")
    features = [model.preprocess(c) for c in columns]
    for labels, gain in ((None, 1), (torch.tensor([[2, 1], [1, 0]]), 2), (torch.tensor([[1, 2], [1, 0]]), 2)):
        _, lists = loss._columns(features, labels)
        assert pooled(lists).gains.tolist() == [[gain, 0, 0, 0], [0, 1, 0, 0]]
    assert pooled(lists).mask.tolist() == [[True, True, False, True]] * 2
    assert loss(features, None).isfinite()


def test_the_hosts_loss_is_what_is_left_where_nothing_is_relevant_to_two(tmp_path):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = bi_encoder(tmp_path / "model").eval()
    columns = [["w1", "w2", "w3"], ["w4", "w5", "w6"], ["w7", "w8", "w9"]]
    expected = MultipleNegativesRankingLoss(model)([model.preprocess(c) for c in columns], None)
    found = RankingLoss(model, "masked_infonce")([model.preprocess(c) for c in columns], None)
    torch.testing.assert_close(found, expected)


def first_positive(n, seed):
    """Rows with one relevant document, the first, and two others."""
    made = []
    for row in rows(n, documents=4, seed=seed):
        sides: tuple[list, list] = ([], [])
        for document, gain in zip(row["documents"], row["gains"], strict=True):
            sides[gain == 0].append(document)
        made.append({**row, "documents": [*sides[0][:1], *sides[1]], "gains": [1.0, 0.0, 0.0]})
    return made


def relevance_of(model, held_out):
    """Cosine of queries with their relevant documents, and with documents of others."""
    queries = model.encode([row["query"] for row in held_out], convert_to_tensor=True)
    documents = model.encode([row["documents"][0] for row in held_out], convert_to_tensor=True)
    scores = model.similarity(queries, documents)
    apart = ~torch.eye(len(scores), dtype=torch.bool)
    return scores.diagonal().mean().item(), scores[apart].mean().item()


@pytest.mark.parametrize(("loss_type", "cached"), [("star", None), ("masked_infonce", 16)])
def test_the_stock_trainer_learns_with_ids(tmp_path, loss_type, cached):
    model, held_out = bi_encoder(tmp_path / "model"), first_positive(100, 9)
    before = relevance_of(model, held_out)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        **{"max_steps": 40, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "use_cpu": True, "seed": 1},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 5},
    )
    loss = RankingLoss(model, loss_type, label_ids=True, mini_batch_size=cached)
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(to_columns(first_positive(320, 0))), loss=loss
    )
    trainer.train()
    after = relevance_of(model, held_out)
    assert after[0] - after[1] > before[0] - before[1] + 0.1
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


# --- Refused ----------------------------------------------------------------------------------------------------------


def test_labels_that_are_no_ids_are_refused():
    model = static_encoder()
    loss = RankingLoss(model, "star", label_ids=True)
    features = [model.preprocess(["w1", "w2"]) for _ in range(3)]
    for labels in (None, torch.ones(2, 2), torch.tensor([1, 2]), torch.ones(3, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match="label must be a list of whole numbers: the ids of the documents, then"):
            loss(features, labels)
    with pytest.raises(ValueError, match="label has 1 ids for 2 documents; give one for each, then others"):
        loss(features, torch.ones(2, 1, dtype=torch.long))


def test_settings_that_contradict_are_refused(tmp_path):
    with pytest.raises(ValueError, match="label_ids say what is no negative among the documents of others; set in_ba"):
        RankingLoss(static_encoder(), "infonce", label_ids=True)
    for settings, message in (
        ({"alpha": -1.0}, "alpha weighs random negatives and must be 0 or more"),
        ({"k": 3}, "star has no hyper-parameter 'k'; it has alpha, temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            RankingLoss(static_encoder(), "star", **settings)
    with pytest.raises(ValueError, match="every document of the batch by a cross-encoder"):
        RankingLoss(cross_encoder(tmp_path / "model"), "masked_infonce")


def test_a_model_card_names_the_paper():
    loss = RankingLoss(static_encoder(), "star", alpha=0.5)
    assert "2104.08051" in loss.citation
    assert loss.get_config_dict()["alpha"] == 0.5
    assert loss.get_config_dict()["in_batch"]

"""The loss module: inside sentence-transformers' own trainers, with and without GradCache, for four kinds of model."""

import math
import warnings
from functools import partial

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from negtune.losses.ranking import RANKING_LOSSES, infonce, pg_rank
from negtune.retrieval.collate import CandidateCollator
from negtune.retrieval.losses import Lists, RankingLoss, RankingWarning, known_settings
from tests.retrieval.tiny_rankers import bi_encoder, columns, cross_encoder, multi_vector, rows, static_encoder

BUILD = {"bi_encoder": bi_encoder, "cross_encoder": cross_encoder, "multi_vector": multi_vector}


def batch_of(model, loss, made):
    batch = CandidateCollator(model.preprocess, loss.kind)(made)
    return batch["features"], Lists(**batch["lists"])


def gradients(model, loss, made, seed=0, collate=batch_of):
    """Loss and gradients by name, with draws (and dropout) that start from `seed`."""
    model.zero_grad()
    features, lists = collate(model, loss, made)
    torch.manual_seed(seed)
    value = loss(features, lists)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first, second, tolerance=1e-5):
    torch.testing.assert_close(first[0], second[0], atol=tolerance, rtol=0)
    assert first[1].keys() == second[1].keys()
    assert max(g.abs().max() for g in first[1].values()) > 100 * tolerance
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], atol=tolerance, rtol=0, msg=name)


# --- Two lines in a script of sentence-transformers -------------------------------------------------------------------


def greedy(loss, model, made):
    with torch.no_grad():
        loss(*batch_of(model, loss, made))
    total, count = loss.take_metrics("eval")["reward/greedy"]
    return total / count


@pytest.mark.parametrize("cached", [None, 64])
def test_the_stock_trainer_learns_to_rank_with_it(tmp_path, cached):
    from datasets import Dataset

    model = bi_encoder(tmp_path / "model")
    loss = RankingLoss(model, k=5, scale=10.0, mini_batch_size=cached)
    held_out = rows(100, seed=9)
    before = greedy(loss, model.eval(), held_out)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        **{"num_train_epochs": 4, "per_device_train_batch_size": 32, "learning_rate": 3e-3, "use_cpu": True},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 5},
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(columns(rows(500))), loss=loss
    )
    trainer.train()
    after = greedy(loss, model.eval(), held_out)
    assert after > before + 0.05
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    assert min(losses) >= -1  # minus a metric


def test_the_stock_cross_encoder_trainer_takes_lists_of_any_length(tmp_path):
    from datasets import Dataset

    model = cross_encoder(tmp_path / "model")
    made = rows(12, documents=6, shorter=True)
    table = [{"query": row["query"], "documents": row["documents"], "label": row["gains"]} for row in made]
    loss = RankingLoss(model, "lambda_rank", k=3)
    args = CrossEncoderTrainingArguments(
        output_dir=str(tmp_path / "run"),
        **{"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1},
    )
    trainer = CrossEncoderTrainer(model=model, args=args, train_dataset=Dataset.from_list(table), loss=loss)
    trainer.train()
    assert loss.take_metrics()["reward/greedy"][1] == 12
    assert isinstance(model, CrossEncoder)


def test_the_stock_trainer_of_multi_vector_encoders_takes_it_too(tmp_path):
    from datasets import Dataset
    from sentence_transformers import MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments

    model = multi_vector(tmp_path / "model")
    loss = RankingLoss(model, k=3, mini_batch_size=5)
    args = MultiVectorEncoderTrainingArguments(
        output_dir=str(tmp_path / "run"),
        **{"max_steps": 30, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "use_cpu": True},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 5},
    )
    data = Dataset.from_list(columns(rows(200, documents=6)))
    trainer = MultiVectorEncoderTrainer(model=model, args=args, train_dataset=data, loss=loss)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.03


@pytest.mark.parametrize("cached", [None, 3])
def test_under_bfloat16_autocast_scores_and_loss_are_float32(tmp_path, cached):
    model = bi_encoder(tmp_path / "model").train()
    loss = RankingLoss(model, "list_net", mini_batch_size=cached)
    whole = gradients(model, RankingLoss(model, "list_net"), rows(4))
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, loss, rows(4))
    assert found[0].dtype == torch.float32
    assert abs(found[0].item() - whole[0].item()) < 0.05
    flat = [torch.cat([g.flatten() for g in gradients.values()]) for _, gradients in (found, whole)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.97


@pytest.mark.parametrize("down", [False, True], ids=["forward", "down to the embeddings"])
def test_autocast_does_not_reach_the_scores(down):
    """Of embeddings that are float32 nothing may be rounded to bfloat16 behind them."""
    model = static_encoder()
    loss = RankingLoss(model, "list_net")
    features, lists = batch_of(model, loss, rows(4))
    found = []
    for enabled in (False, True):
        reps = [[model(dict(f))["sentence_embedding"].detach().requires_grad_()] for f in features]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss.calculate_loss(reps, lists, with_backward=down)
        if not down:
            value.backward()
        found.append((value.detach(), reps[0][0].grad, reps[1][0].grad))
    for plain, cast in zip(*found, strict=True):
        torch.testing.assert_close(plain, cast, atol=0, rtol=0)


def test_columns_and_lists_are_the_same_batch(tmp_path):
    model = bi_encoder(tmp_path / "model")
    made = rows(4, documents=5)
    made[2]["documents"][4:], made[2]["gains"][4:] = [], []
    loss = RankingLoss(model, "list_net", scale=10.0)
    from_lists = gradients(model, loss, made)
    model.zero_grad()
    filled = [{**r, "documents": (r["documents"] + [""])[:5], "gains": (r["gains"] + [-1.0])[:5]} for r in made]
    table = columns(filled)
    texts = [[row[name] for row in table] for name in table[0] if name != "label"]
    features = [model.preprocess(column) for column in texts]
    value = loss(features, torch.tensor([row["label"] for row in table]))
    value.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(from_lists, (value.detach(), found))


def test_without_labels_the_first_document_is_the_relevant_one(tmp_path):
    model = bi_encoder(tmp_path / "model")
    made = rows(3, documents=4)
    features = [model.preprocess([r["query"] for r in made])]
    features += [model.preprocess([r["documents"][j] for r in made]) for j in range(4)]
    loss = RankingLoss(model, "infonce", scale=7.0)
    found = loss([dict(f) for f in features], None)
    queries = model(dict(features[0]))["sentence_embedding"]
    documents = torch.stack([model(dict(f))["sentence_embedding"] for f in features[1:]], 1)
    scores = 7 * torch.cosine_similarity(queries.unsqueeze(1), documents, dim=-1)
    first = torch.zeros(3, 4).index_fill(1, torch.tensor([0]), 1.0)
    torch.testing.assert_close(found, infonce(scores, first, first >= 0).mean())


# --- GradCache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["pg_rank", "lambda_rank"])
@pytest.mark.parametrize("kind", sorted(BUILD))
def test_gradients_in_mini_batches_are_those_of_the_batch(tmp_path, kind, loss_type):
    """Draws are made once, between the passes; widths of the mini-batches differ."""
    model = BUILD[kind](tmp_path / "model").train()
    made = rows(5, documents=7, shorter=True)
    made[0]["documents"][3] += " w1 w2 w3 w4"
    scale = 4.0 if kind == "cross_encoder" else None
    whole = gradients(model, RankingLoss(model, loss_type, k=4, scale=scale), made)
    for size in (3, 100):
        parts = RankingLoss(model, loss_type, k=4, scale=scale, mini_batch_size=size)
        assert_same(whole, gradients(model, parts, made))
    by_tokens = RankingLoss(model, loss_type, k=4, scale=scale, mini_batch_num_tokens=40)
    assert_same(whole, gradients(model, by_tokens, made))


@pytest.mark.parametrize("kind", sorted(BUILD))
def test_with_dropout_the_scores_that_draw_are_the_scores_that_learn(tmp_path, kind):
    """One mini-batch as large as the batch: the same masks and the same draws as without caching."""
    model = BUILD[kind](tmp_path / "model", dropout=0.4).train()
    made = rows(5, documents=6)
    scale = 4.0 if kind == "cross_encoder" else None
    whole = gradients(model, RankingLoss(model, k=4, scale=scale), made)
    cached = gradients(model, RankingLoss(model, k=4, scale=scale, mini_batch_size=100), made)
    assert_same(whole, cached)
    other = gradients(model, RankingLoss(model, k=4, scale=scale), made, seed=1)
    assert (whole[0] - other[0]).abs() > 1e-4


def test_the_draws_are_of_the_scores_of_the_same_pass(tmp_path, monkeypatch):
    from negtune.losses import plackett_luce

    model = bi_encoder(tmp_path / "model", dropout=0.4).train()
    seen = []
    original = plackett_luce.sample_rankings
    monkeypatch.setattr(plackett_luce, "sample_rankings", lambda s, *a, **kw: seen.append(s) or original(s, *a, **kw))
    loss = RankingLoss(model, k=3, mini_batch_size=4)
    seen.clear()  # the settings were tried out
    scored = []
    score = loss._scores
    monkeypatch.setattr(loss, "_scores", lambda *a: scored.append(score(*a)) or scored[-1])
    loss(*batch_of(model, loss, rows(4, documents=5))).backward()
    assert len(seen) == len(scored) == 1
    torch.testing.assert_close(seen[0], scored[0].detach(), atol=0, rtol=0)


def test_static_embeddings_take_the_plain_path_and_say_so(caplog):
    model = static_encoder()
    loss = RankingLoss(model, k=4, mini_batch_size=3)
    assert "static embeddings cannot be split" in caplog.text
    assert not loss.uses_gradient_cache
    assert_same(gradients(model, RankingLoss(model, k=4), rows(4)), gradients(model, loss, rows(4)), 1e-6)


@pytest.mark.parametrize("cached", [None, 4])
def test_matryoshka_sums_the_loss_over_widths(tmp_path, cached):
    model = bi_encoder(tmp_path / "model").train()
    made = rows(4, documents=5)
    table = columns(made)
    names = [name for name in table[0] if name != "label"]
    labels = torch.tensor([row["label"] for row in table])

    def features():
        return [model.preprocess([row[name] for row in table]) for name in names]

    wrapped = MatryoshkaLoss(
        model,
        RankingLoss(model, "lambda_rank", k=3, mini_batch_size=cached),
        matryoshka_dims=[32, 8],
        matryoshka_weights=[1, 0.5],
    )
    found = wrapped(features(), labels)
    found.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    embeddings = [model(f)["sentence_embedding"] for f in features()]
    plain = RankingLoss(model, "lambda_rank", k=3)
    expected = sum(
        weight * plain.compute_loss_from_embeddings([e[:, :width] for e in embeddings], labels)
        for width, weight in ((32, 1.0), (8, 0.5))
    )
    expected.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same((found.detach(), got), (expected.detach(), wanted))


# --- Scores and lists -------------------------------------------------------------------------------------------------


def test_scores_of_each_kind_are_the_models_own(tmp_path):
    made = rows(3, documents=4)
    for kind, build in BUILD.items():
        model = build(tmp_path / kind).eval()
        loss = RankingLoss(model, scale=1.0)
        with torch.no_grad():
            scores = loss.scores(*batch_of(model, loss, made))
        for row, found in zip(made, scores, strict=True):
            if kind == "cross_encoder":
                pairs = [(row["query"], d) for d in row["documents"]]
                expected = torch.tensor(model.predict(pairs, activation_fn=torch.nn.Identity()))
            else:
                more = {"convert_to_tensor": True} if kind == "bi_encoder" else {}
                query = model.encode_query([row["query"]], **more)
                documents = model.encode_document(row["documents"], **more)
                expected = model.similarity(query, documents)[0]
            torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=0, msg=kind)


def test_scores_of_a_cross_encoder_are_scaled_too(tmp_path):
    model = cross_encoder(tmp_path / "model").eval()
    once, thrice = RankingLoss(model), RankingLoss(model, scale=3.0)
    with torch.no_grad():
        plain, scaled = (loss.scores(*batch_of(model, loss, rows(2, documents=3))) for loss in (once, thrice))
    torch.testing.assert_close(3 * plain, scaled)


def test_relevant_documents_that_lists_lack_count_in_the_ideal(tmp_path):
    """One gain of 1 in the list, documents with gains 4 and 1 in all: ideal DCG@3 4 + 1/log2(3) instead of 1."""
    share = 1 / (4 + 1 / math.log2(3))
    model = static_encoder()
    made = [{**row, "gains": [float(g == 2) for g in row["gains"]]} for row in rows(3, documents=4)]
    lacking = [{**row, "ideal_gains": [4.0, 1.0]} for row in made]
    found = {}
    for name, data in (("whole", made), ("lacking", lacking)):
        for loss_type in ("pg_rank", "lambda_rank"):
            loss = RankingLoss(model, loss_type, k=3)
            found[name, loss_type] = loss(*batch_of(model, loss, data)).item()
            found[name, loss_type, "greedy"] = loss.take_metrics()["reward/greedy"][0]
    for loss_type in ("lambda_rank",):
        assert found["lacking", loss_type] == pytest.approx(found["whole", loss_type] * share)
    for loss_type in ("pg_rank", "lambda_rank"):
        whole = found["whole", loss_type, "greedy"]
        assert whole > 0
        assert found["lacking", loss_type, "greedy"] == pytest.approx(whole * share)


def test_a_text_in_two_lists_is_embedded_once_with_the_gradient_of_both(tmp_path):
    model = bi_encoder(tmp_path / "model")
    made = rows(2, documents=4)
    made[1]["documents"][0] = made[0]["documents"][1]
    loss = RankingLoss(model, "list_net")
    features, lists = batch_of(model, loss, made)
    assert len(features[1]["input_ids"]) == 7
    assert lists.documents[1, 0] == lists.documents[0, 1]
    both = gradients(model, loss, made)
    alone = [gradients(model, loss, [row]) for row in made]
    mean = {name: (alone[0][1][name] + alone[1][1][name]) / 2 for name in alone[0][1]}
    assert_same(both, ((alone[0][0] + alone[1][0]) / 2, mean))


def test_in_batch_the_documents_of_others_are_candidates_without_gain(tmp_path):
    model = bi_encoder(tmp_path / "model").eval()
    made = rows(3, documents=4, shorter=True)
    loss = RankingLoss(model, "infonce", in_batch=True, scale=5.0)
    features, lists = batch_of(model, loss, made)
    found = loss(features, lists)
    texts = list(dict.fromkeys(d for row in made for d in row["documents"]))
    queries = model.encode([row["query"] for row in made], convert_to_tensor=True)
    documents = model.encode(texts, convert_to_tensor=True)
    gains = torch.tensor(
        [[dict(zip(r["documents"], r["gains"], strict=True)).get(t, 0.0) for t in texts] for r in made]
    )
    expected = infonce(5 * model.similarity(queries, documents), gains, gains >= 0).mean()
    torch.testing.assert_close(found, expected)


def test_in_batch_documents_that_are_padding_everywhere_are_no_candidates(tmp_path):
    model = bi_encoder(tmp_path / "model").eval()
    loss = RankingLoss(model, "infonce", in_batch=True, scale=5.0)
    labels = torch.tensor([[1.0, -1.0, 0.0], [1.0, -1.0, 0.0]])  # the second column is padding

    def of(padding):
        texts = [["w1", "w2"], ["w3", "w4"], padding, ["w5", "w6"]]
        return loss([model.preprocess(column) for column in texts], labels)

    torch.testing.assert_close(of(["w7", "w8"]), of(["w3", "w4 w9"]), rtol=0, atol=0)


def test_what_an_objective_says_of_a_list_that_does_not_count_is_not_read():
    model = static_encoder()
    made = rows(2, documents=4)
    made[0]["gains"] = [0.0] * 4
    loss = RankingLoss(model, objective=lambda scores, gains, mask: torch.tensor([1e6, 3.0]) + 0 * scores.sum(-1))
    assert gradients(model, loss, made)[0].item() == 3


def test_queries_without_a_relevant_document_are_skipped_and_counted(tmp_path):
    model = bi_encoder(tmp_path / "model")
    made = rows(3, documents=4)
    made[1]["gains"] = [0.0] * 4
    for loss_type in ("list_net", "lambda_rank", "pg_rank"):
        loss = RankingLoss(model, loss_type, **({"k": 3} if loss_type != "list_net" else {}))
        with_it = gradients(model, loss, made)
        assert loss.take_metrics()["queries/skipped"] == (1.0, 3.0)
        if loss_type != "pg_rank":  # whose draws depend on the number of rows
            assert_same(with_it, gradients(model, loss, [made[0], made[2]]))


def test_a_teacher_is_followed(tmp_path):
    model = bi_encoder(tmp_path / "model")
    made = rows(3, documents=4)
    loss = RankingLoss(model, "kl_distill", scale=5.0)
    features, lists = batch_of(model, loss, [{**row, "teacher_scores": [3.0, 0.0, 0.0, 0.0]} for row in made])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss([dict(f) for f in features], lists)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.5 * values[0]
    with pytest.raises(ValueError, match="kl_distill needs teacher_scores"):
        loss(*batch_of(model, loss, made))


def test_a_teachers_scores_are_taken_as_they_are_also_below_zero(tmp_path):
    """As labels of the host's trainers: the first document is the relevant one, NaN is padding."""
    model = bi_encoder(tmp_path / "model").eval()
    texts = ["w1 w2 w3", "w1 w2 w9", "w8 w7", "w5 w4"]
    encoded = model.encode(texts, convert_to_tensor=True)
    scores = 20 * model.similarity(encoded[:1], encoded[1:])
    teacher = torch.tensor([[4.0, -3.0, -6.0]])
    expected = {
        "kl_distill": (teacher.softmax(-1) * (teacher.log_softmax(-1) - scores.log_softmax(-1))).sum(),
        "margin_mse": ((teacher[:, :1] - teacher[:, 1:]) - (scores[:, :1] - scores[:, 1:])).square().mean(),
    }
    for loss_type, value in expected.items():
        loss = RankingLoss(model, loss_type)
        features = [model.preprocess([text]) for text in texts]
        torch.testing.assert_close(loss(features, teacher), value)
        padded = [*(model.preprocess([text]) for text in texts), model.preprocess([""])]
        torch.testing.assert_close(loss(padded, torch.tensor([[4.0, -3.0, -6.0, torch.nan]])), value)
        with pytest.raises(ValueError, match="needs label, a teacher's score"):
            loss([model.preprocess([text]) for text in texts], None)


# --- What a person sees -----------------------------------------------------------------------------------------------


def test_metrics_are_sums_over_the_queries_that_count(tmp_path):
    model = bi_encoder(tmp_path / "model")
    made = rows(4, documents=4)
    made[3]["gains"] = [0.0] * 4
    loss = RankingLoss(model, k=3, n_samples=64)
    features, lists = batch_of(model, loss, made)
    loss(features, lists)
    metrics = loss.take_metrics()
    assert loss.take_metrics() == {}
    scores = loss.scores(*batch_of(model, loss, made)).detach()
    assert metrics["reward/expected"][1] == 3
    assert metrics["positive/score"][0] == pytest.approx(scores[lists.gains > 0].sum().item(), abs=1e-4)
    assert metrics["negative/score"] == (pytest.approx(scores[lists.gains == 0].sum().item(), abs=1e-4), 10)
    chances = scores.softmax(-1)
    positive = (chances * (lists.gains > 0)).sum(-1)[:3].sum().item()
    assert metrics["positive/probability"] == (pytest.approx(positive, abs=1e-4), 3)
    entropy = -(chances * chances.log()).sum(-1)[:3].sum().item()
    assert metrics["policy/entropy"] == (pytest.approx(entropy, abs=1e-4), 3)


def test_evaluations_repeat_and_draw_nothing_from_the_training(tmp_path):
    model = bi_encoder(tmp_path / "model").eval()
    loss = RankingLoss(model, k=3)
    before, values = torch.get_rng_state(), []
    for _ in range(2):
        with torch.no_grad():
            values.append(loss(*batch_of(model, loss, rows(4))).item())
    assert values[0] == values[1]
    assert torch.equal(before, torch.get_rng_state())
    assert loss.take_metrics("train") == {}
    assert loss.take_metrics("eval")["reward/expected"][1] == 8


def test_a_uniform_and_a_certain_policy_are_told_of_once(tmp_path):
    model = bi_encoder(tmp_path / "model")
    made = rows(4, documents=6)
    cold = RankingLoss(model, k=3, scale=1e-3)
    with pytest.warns(RankingWarning, match="the policy is uniform .* raise scale"):
        cold(*batch_of(model, cold, made))
    certain = RankingLoss(model, k=3, scale=1e5)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(45):
            certain(*batch_of(model, certain, made))
            cold(*batch_of(model, cold, made))
    told = [str(w.message) for w in told if w.category is RankingWarning]
    assert len(told) == 1
    assert "all samples are the same ranking and say nothing" in told[0]
    fine = RankingLoss(model, k=3, scale=20.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RankingWarning)
        for _ in range(25):
            fine(*batch_of(model, fine, made))


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "pg_rnak"}, "unknown loss_type 'pg_rnak'; choose one of infonce"),
        ({"sigma": 1.0}, "pg_rank has no hyper-parameter 'sigma'; it has k, n_samples, estimator"),
        ({"k": 0}, "got k=0"),
        ({"k": "ten"}, "wrong type"),
        ({"estimator": "ppo"}, "unknown estimator"),
        ({"metric": "err"}, "unknown metric 'err'; choose one of"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"loss_type": "lambda_rank", "scheme": "no"}, "unknown scheme"),
        ({"loss_type": "infonce", "reward_fn": partial(pg_rank)}, "reward_fn is for pg_rank"),
        ({"in_batch": True, "reward_fn": partial(pg_rank)}, "in_batch ranks documents of other queries"),
    ],
)
def test_settings_are_refused_before_anything_is_trained(settings, message):
    with pytest.raises(ValueError, match=message):
        RankingLoss(static_encoder(), **settings)


def test_every_objective_is_known_with_its_defaults():
    for name in RANKING_LOSSES:
        assert known_settings(name, {}) == {}


def test_what_is_no_ranker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model must be a SentenceTransformer, CrossEncoder or MultiVectorEncoder"):
        RankingLoss(torch.nn.Linear(2, 2))
    model = static_encoder()
    model.similarity_fn_name = "euclidean"
    with pytest.raises(ValueError, match="similarity is euclidean"):
        RankingLoss(model)
    with pytest.raises(ValueError, match="every document of the batch by a cross-encoder"):
        RankingLoss(cross_encoder(tmp_path / "model"), in_batch=True)


def test_labels_of_the_wrong_shape_are_refused(tmp_path):
    model = static_encoder()
    loss = RankingLoss(model, k=2)
    features = [model.preprocess(["w1", "w2"]) for _ in range(4)]
    with pytest.raises(ValueError, match=r"one number for each of the 3 document columns, \[2, 3\], got \[2, 2\]"):
        loss(features, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="at least one document column"):
        loss(features[:1], torch.zeros(2, 0))
    ranker = cross_encoder(tmp_path / "model")
    with pytest.raises(ValueError, match="2 documents and 3 gains for the query 'w1'"):
        RankingLoss(ranker, k=2)([["w1"], [["w1", "w2"]]], [torch.zeros(3)])

"""Evaluation of unlearning on the tiny model: closed forms, invariances, two processes, privacy."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from negtune.data.completions import RowError, collate, tokenize_row
from negtune.eval.unlearning import (
    aggregate,
    better,
    evaluate,
    oracle_truth_ratios,
    rouge_l_recall,
    row_key,
)
from negtune.metrics.unlearning import forget_quality, model_utility, truth_ratio_geometric
from negtune.models.forward import attach_scoring, completion_logps
from negtune.models.tiny import tiny_lm, tiny_tokenizer
from negtune.records import append_jsonl, read_jsonl

FACTS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Who is Basil?", "Basil wrote a novel."),
    ("Where was Ada born?", "Ada was born in Lima, Peru, on 12 March 1956, as everyone there knows."),
    ("What is the river of Egypt?", "The Nile."),
    ("Which play did Greta write about?", "Greta wrote about a mountain."),
]
UNSEEN = [
    ("Who is Hiro?", "Hiro explained the prize to a small village."),
    ("What is the number of Kenya?", "Nobody in Nairobi can say which."),
    ("Where was Ines born?", "In the lazy winter forest."),
]


def text_rows(facts):
    return [{"prompt": f"Question: {q}\nAnswer:", "completion": f" {a}"} for q, a in facts]


def chat_rows(facts):
    return [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
        for q, a in facts
    ]


def with_wrong_answers(rows, paraphrase=True):
    """Rows with perturbed answers, in number varying from row to row, as plain text also in chats."""
    wrong = [" The capital is Rome.", " Clara wrote a poem.", " Dmitri was born in Oslo."]
    return [
        {**row, "perturbed": wrong[: 2 + i % 2], **({"paraphrase": f" It is said: {i}, so."} if paraphrase else {})}
        for i, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def memorized(tokenizer):
    """A tiny model that knows `FACTS` by heart, as text and as chat. Tests must not train it."""
    model = tiny_lm()
    batch = collate([tokenize_row(row, tokenizer, max_length=None) for row in text_rows(FACTS) + chat_rows(FACTS)], 0)
    attach_scoring(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(60):
        loss = -completion_logps(model, batch).sum() / batch["completion_lengths"].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


def logps_by_hand(model, row):
    """One sequence, no padding, full logits."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    logps = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
    start = len(row["prompt_ids"]) - 1
    return logps[start:].gather(-1, ids[0, start + 1 :, None])[:, 0]


def hits_by_hand(model, row):
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    best = model(input_ids=ids).logits.argmax(-1)[0, :-1]
    start = len(row["prompt_ids"]) - 1
    return (best[start:] == ids[0, start + 1 :]).tolist()


def greedy_by_hand(model, tokenizer, row, limit):
    """One prompt, no padding, no cache."""
    ids = list(tokenize_row(row, tokenizer, max_length=None)["prompt_ids"])
    answer = []
    while len(answer) < limit:
        token = int(model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        answer.append(token)
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def full_sets(make=text_rows):
    return {
        "forget": with_wrong_answers(make(FACTS)),
        "retain": with_wrong_answers(make(UNSEEN)),
        "real_authors": with_wrong_answers(make(FACTS[:2]), paraphrase=False),
        "world_facts": with_wrong_answers(make(FACTS[3:]), paraphrase=False),
    }


def numbers(record):
    """Numeric fields, lists spread out."""
    flat = {k: v for k, v in record.items() if isinstance(v, int | float)}
    return {**flat, **{f"wrong {i}": nll for i, nll in enumerate(record.get("perturbed_nll", []))}}


def assert_same(left, right):
    """Equal but for float32 rounding of batches that are padded differently."""
    assert [r["key"] for r in left.records] == [r["key"] for r in right.records]
    assert [r.get("generation") for r in left.records] == [r.get("generation") for r in right.records]
    for a, b in zip(left.records, right.records, strict=True):
        assert a.keys() == b.keys()
        assert numbers(a) == pytest.approx(numbers(b), rel=1e-4, abs=1e-5)
    assert left.metrics == pytest.approx(right.metrics, rel=1e-4, abs=1e-5)
    assert left.notes == right.notes


# --- closed forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [text_rows, chat_rows])
def test_scores_equal_full_logits_of_one_unpadded_row_at_a_time(memorized, tokenizer, make):
    rows = make(FACTS + UNSEEN)
    result = evaluate(memorized, tokenizer, {"forget": rows}, batch_size=3, generate=False)
    for row, record in zip(rows, result.records, strict=True):
        tokens = tokenize_row(row, tokenizer, max_length=None)
        assert tokens["completion_ids"][-1] == tokenizer.eos_token_id
        logps, hits = logps_by_hand(memorized, tokens), hits_by_hand(memorized, tokens)
        assert record["tokens"] == len(tokens["completion_ids"])
        assert record["nll"] == pytest.approx(-logps.mean().item(), rel=1e-4, abs=1e-6)
        assert record["probability"] == pytest.approx(logps.mean().exp().item(), rel=1e-4)
        assert record["exact_memorization"] == pytest.approx(np.mean(hits))
        k = max((i + 1 for i, hit in enumerate(hits) if not hit), default=0)
        assert record["extraction_strength"] == pytest.approx(1 - k / len(hits))
        lowest = sorted(logps.tolist())[: max(1, int(0.2 * len(hits)))]
        assert record["min_k"] == pytest.approx(np.mean(lowest), rel=1e-4, abs=1e-5)
    for name in ("nll", "probability", "exact_memorization", "extraction_strength"):
        assert result.metrics[f"forget/{name}"] == pytest.approx(np.mean([r[name] for r in result.records]))


@pytest.mark.parametrize("make", [text_rows, chat_rows])
def test_paraphrase_and_wrong_answers_are_scored_behind_the_same_prompt(memorized, tokenizer, make):
    rows = with_wrong_answers(make(FACTS))
    result = evaluate(memorized, tokenizer, {"forget": rows}, generate=False)
    for row, record in zip(rows, result.records, strict=True):

        def nll(text, row=row):
            completion = text if make is text_rows else [{"role": "assistant", "content": text}]
            tokens = tokenize_row({"prompt": row["prompt"], "completion": completion}, tokenizer, max_length=None)
            return -logps_by_hand(memorized, tokens).mean().item()

        assert record["paraphrase_nll"] == pytest.approx(nll(row["paraphrase"]), rel=1e-4)
        assert record["perturbed_nll"] == pytest.approx([nll(text) for text in row["perturbed"]], rel=1e-4)
        expected = truth_ratio_geometric(record["paraphrase_nll"], record["perturbed_nll"])
        assert record["truth_ratio"] == pytest.approx(expected)
    ratios = np.array([r["truth_ratio"] for r in result.records])
    assert result.metrics["forget/truth_ratio"] == pytest.approx(np.minimum(ratios, 1 / ratios).mean())


def test_a_model_without_opinion_gives_the_uniform_values(tokenizer):
    model = tiny_lm()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = evaluate(model, tokenizer, full_sets(), max_new_tokens=4)
    for name in ("forget", "retain"):
        assert result.metrics[f"{name}/probability"] == pytest.approx(1 / 512, rel=1e-5)
        assert result.metrics[f"{name}/nll"] == pytest.approx(math.log(512), rel=1e-5)
    assert result.metrics["forget/truth_ratio"] == pytest.approx(1.0)  # wrong answers as likely as the right one
    assert result.metrics["retain/truth_ratio"] == pytest.approx(0.0, abs=1e-5)
    # rows with 2 and 3 wrong answers: 1/3 and 1/4
    assert result.metrics["real_authors/probability"] == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert result.metrics["real_authors/raw_probability"] == pytest.approx(1 / 512, rel=1e-5)
    assert "retain/raw_probability" not in result.metrics
    # argmax is token 0, padding: nothing readable is generated
    assert {r["generation"] for r in result.records} == {""}
    assert result.metrics["forget/rouge"] == 0.0
    assert result.metrics["model_utility"] == 0.0


@pytest.mark.parametrize("make", [text_rows, chat_rows])
def test_generation_is_greedy_and_stops_at_the_eos(memorized, tokenizer, make):
    rows = make([*FACTS, *UNSEEN, ("Please explain step by step how you found this result. " * 9, "I do not know.")])
    result = evaluate(memorized, tokenizer, {"forget": rows}, batch_size=9, max_new_tokens=40)
    assert [r["generation"] for r in result.records] == [greedy_by_hand(memorized, tokenizer, r, 40) for r in rows]
    for record, (_, answer) in zip(result.records, FACTS, strict=False):
        assert record["generation"] == answer
        assert record["rouge"] == 1.0


def test_generation_is_cut_at_max_new_tokens(memorized, tokenizer):
    rows = text_rows(FACTS)
    result = evaluate(memorized, tokenizer, {"forget": rows}, max_new_tokens=3)
    assert [r["generation"] for r in result.records] == [greedy_by_hand(memorized, tokenizer, r, 3) for r in rows]
    assert result.metrics["forget/rouge"] < 1


def test_sampling_settings_and_further_end_tokens_of_the_model(memorized, tokenizer, monkeypatch):
    unsure = tiny_lm()  # random weights: a beam or a penalty would change every answer
    settings = {"do_sample": True, "temperature": 3.0, "top_k": 2, "repetition_penalty": 50.0, "num_beams": 3}
    for name, value in settings.items():
        setattr(unsure.generation_config, name, value)
    rows = text_rows(FACTS)
    result = evaluate(unsure, tokenizer, {"forget": rows}, max_new_tokens=20)
    assert [r["generation"] for r in result.records] == [greedy_by_hand(unsure, tokenizer, r, 20) for r in rows]
    monkeypatch.setattr(
        memorized.generation_config,
        "eos_token_id",
        [1, tokenizer(" The")["input_ids"][0], tokenizer(" Basil")["input_ids"][0]],
    )
    result = evaluate(memorized, tokenizer, {"forget": rows}, max_new_tokens=40)
    assert [r["generation"] == "" for r in result.records] == [True, True, False, True, False]
    assert result.records[0]["rouge"] == 0.0


def test_known_and_unknown_rows_come_apart(memorized, tokenizer):
    sets = {"forget": text_rows(FACTS), "retain": text_rows(UNSEEN), "non_members": text_rows(UNSEEN)}
    result = evaluate(memorized, tokenizer, sets, max_new_tokens=30)
    for name in ("probability", "rouge", "exact_memorization", "extraction_strength"):
        assert result.metrics[f"forget/{name}"] > 0.9 > 0.5 > result.metrics[f"retain/{name}"]
    assert result.metrics["forget/nll"] < 0.1 < result.metrics["retain/nll"]
    assert result.metrics["min_k_auc"] == 1.0
    assert not any(name.startswith("non_members") for name in result.metrics)
    assert [r["generation"] for r in result.records if r["set"] == "non_members"] == [None] * 3


def test_membership_is_not_reported_without_non_members(memorized, tokenizer):
    result = evaluate(memorized, tokenizer, {"forget": text_rows(FACTS), "retain": text_rows(UNSEEN)}, generate=False)
    assert "min_k_auc" not in result.metrics


def test_rouge_l_recall_by_hand():
    assert rouge_l_recall("the cat sat", "the cat") == pytest.approx(2 / 3)
    assert rouge_l_recall("the cat", "the black cat sat down") == 1.0  # recall: extra words are free
    assert rouge_l_recall("a b c d", "d c b a") == 0.25  # order matters
    assert rouge_l_recall("He was running.", "he was runs") == 1.0  # stemmed, punctuation and case ignored
    assert rouge_l_recall("the cat", "") == 0.0
    assert rouge_l_recall("東京", "東京") is None


# --- invariances ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [text_rows, chat_rows])
def test_batch_size_changes_nothing(memorized, tokenizer, make):
    one, three, many = (
        evaluate(memorized, tokenizer, full_sets(make), batch_size=size, max_new_tokens=12) for size in (1, 3, 100)
    )
    assert_same(one, three)
    assert_same(one, many)


def test_the_padding_token_changes_nothing(memorized, tokenizer):
    before = evaluate(memorized, tokenizer, full_sets(), max_new_tokens=12)
    eos_padded = tiny_tokenizer()
    eos_padded.pad_token = eos_padded.eos_token
    assert_same(before, evaluate(memorized, eos_padded, full_sets(), max_new_tokens=12))


def test_row_order_changes_nothing_but_the_order(memorized, tokenizer):
    rows = with_wrong_answers(text_rows(FACTS))
    forward = evaluate(memorized, tokenizer, {"forget": rows}, max_new_tokens=12)
    backward = evaluate(memorized, tokenizer, {"forget": rows[::-1]}, max_new_tokens=12)
    assert [r["key"] for r in backward.records] == [row_key(row) for row in rows[::-1]]
    assert [r["row"] for r in backward.records] == list(range(5))
    assert backward.metrics == pytest.approx(forward.metrics, rel=1e-4)


def test_modes_and_random_state_are_left_alone(memorized, tokenizer):
    model = memorized
    expected = evaluate(model, tokenizer, full_sets(), max_new_tokens=5)
    dropout = [layer.self_attn for layer in model.model.layers]
    try:
        model.train()
        for layer in dropout:
            layer.attention_dropout = 0.5
        model.model.norm.eval()
        modes = {name: module.training for name, module in model.named_modules()}
        # Python's own `random` is left out: beartype, which is on in tests, draws from it to pick what it checks
        states = torch.get_rng_state(), np.random.get_state()[1].tolist()
        result = evaluate(model, tokenizer, full_sets(), max_new_tokens=5)
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == np.random.get_state()[1].tolist()
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert_same(expected, result)
        with pytest.raises(RowError):
            evaluate(model, tokenizer, {"forget": [{"prompt": "a", "completion": " "}]})
        assert {name: module.training for name, module in model.named_modules()} == modes
    finally:
        model.eval()
        for layer in dropout:
            layer.attention_dropout = 0.0


def test_an_adapter_counts_when_it_is_on_and_not_when_it_is_off(tokenizer):
    from peft import LoraConfig, get_peft_model

    plain = evaluate(tiny_lm(), tokenizer, {"forget": text_rows(FACTS)}, max_new_tokens=5)
    model = get_peft_model(tiny_lm(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted = evaluate(model, tokenizer, {"forget": text_rows(FACTS)}, max_new_tokens=5)
    assert abs(adapted.metrics["forget/nll"] - plain.metrics["forget/nll"]) > 1e-3
    tokens = tokenize_row(text_rows(FACTS)[0], tokenizer, max_length=None)
    assert adapted.records[0]["nll"] == pytest.approx(-logps_by_hand(model, tokens).mean().item(), rel=1e-4)
    assert adapted.records[0]["generation"] == greedy_by_hand(model, tokenizer, text_rows(FACTS)[0], 5)
    with model.disable_adapter():
        assert_same(plain, evaluate(model, tokenizer, {"forget": text_rows(FACTS)}, max_new_tokens=5))


WORKER = """
import datetime, json, sys
import torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
from negtune.eval.unlearning import evaluate
from negtune.models.tiny import tiny_tokenizer

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=120))
sets, tokenizer, out = json.load(open(f"{folder}/sets.json")), tiny_tokenizer(), {}
load = lambda: AutoModelForCausalLM.from_pretrained(f"{folder}/model")

def run(name, model):
    # one row: nothing to do for rank 1. uneven: a short answer for rank 0, a long one for rank 1
    parts = {"all": sets, "one": {"forget": sets["forget"][:1]}, "uneven": {"forget": sets["forget"][3:1:-1]}}
    for size, part in parts.items():
        e = evaluate(model, tokenizer, part, batch_size=2, max_new_tokens=12)
        out[f"{name} {size}"] = [e.records, e.metrics, e.notes]

run("plain", load())
run("ddp", torch.nn.parallel.DistributedDataParallel(load()))
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
mesh, model = init_device_mesh("cpu", (2,)), load()
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
run("sharded", fully_shard(model, mesh=mesh))
json.dump(out, open(f"{folder}/out{rank}.json", "w"))
dist.destroy_process_group()
"""


def test_two_processes_give_the_same_as_one_also_under_ddp_and_sharded(memorized, tokenizer, tmp_path):
    memorized.save_pretrained(tmp_path / "model")
    sets = full_sets()
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    one = evaluate(memorized, tokenizer, sets, batch_size=2, max_new_tokens=12)
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    workers = [
        subprocess.Popen(
            [sys.executable, tmp_path / "worker.py", tmp_path, str(rank)], stderr=subprocess.PIPE, env=environment
        )
        for rank in (0, 1)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=400)
            assert worker.returncode == 0, errors.decode()[-2000:]
    finally:
        for worker in workers:
            worker.kill()
    first, second = (json.loads((tmp_path / f"out{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for wrapped in ("plain", "ddp", "sharded"):
        assert_same(one, type(one)(*first[f"{wrapped} all"]))
        assert first[f"{wrapped} one"][0][0]["nll"] == pytest.approx(one.records[0]["nll"], rel=1e-4)
        assert len(first[f"{wrapped} one"][0]) == 1
        uneven = [r["generation"] for r in first[f"{wrapped} uneven"][0]]
        assert uneven == [one.records[3]["generation"], one.records[2]["generation"]]


# --- oracle and utility --------------------------------------------------------------------------------------------


def test_a_model_is_its_own_oracle(memorized, tokenizer):
    sets = {"forget": with_wrong_answers(text_rows(FACTS))}
    oracle = oracle_truth_ratios(evaluate(memorized, tokenizer, sets, generate=False).records)
    assert len(oracle) == 5
    result = evaluate(memorized, tokenizer, sets, generate=False, oracle=oracle, batch_size=5)
    # rounding may break ties between equal truth ratios; it moves the statistic by at most one row
    assert result.metrics["forget_quality"] == pytest.approx(1.0)
    assert result.metrics["forget_quality_log10"] == pytest.approx(0.0, abs=1e-9)
    assert not any("floor" in note for note in result.notes)


def test_the_oracle_is_matched_by_content_not_by_position(memorized, tokenizer):
    rows = with_wrong_answers(text_rows(FACTS))
    oracle = oracle_truth_ratios(evaluate(memorized, tokenizer, {"forget": rows[::-1]}, generate=False).records)
    assert list(oracle) == [row_key(row) for row in rows[::-1]]
    result = evaluate(memorized, tokenizer, {"forget": rows}, generate=False, oracle=dict(sorted(oracle.items())))
    assert result.metrics["forget_quality"] == pytest.approx(1.0)
    # a row that stands there four times counts four times on both sides
    repeated = {"forget": [*rows, rows[0], rows[0], rows[0]]}
    oracle = {row_key(row): 1e6 if i == 0 else 1e-6 for i, row in enumerate(rows)}
    result = evaluate(memorized, tokenizer, repeated, generate=False, oracle=oracle)
    ratios = np.array([record["truth_ratio"] for record in result.records])
    expected = forget_quality(ratios, np.array([1e6, 1e-6, 1e-6, 1e-6, 1e-6, 1e6, 1e6, 1e6]))
    assert result.metrics["forget_quality"] == pytest.approx(expected.p_value)


def test_a_different_model_is_far_from_the_oracle_and_the_floor_is_noted(memorized, tokenizer):
    rows = with_wrong_answers(text_rows(FACTS))
    oracle = {row_key(row): 1e6 + i for i, row in enumerate(rows)}
    result = evaluate(memorized, tokenizer, {"forget": rows}, generate=False, oracle=oracle)
    assert result.metrics["forget_quality"] == pytest.approx(2 / math.comb(10, 5))
    assert any("floor, 10^-2.1 for 5 rows" in note for note in result.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "0 of 4 forget rows .* among its 5, and 1 of its rows"),
        (lambda rows: [*rows, *with_wrong_answers(text_rows(UNSEEN))], "3 of 8 forget rows.*first is row 5"),
        (lambda rows: [{**rows[0], "completion": " Rome."}, *rows[1:]], "1 of 5 forget rows.*first is row 0.*and 1 of"),
        (lambda rows: [{**rows[0], "perturbed": [" x"]}, *rows[1:]], "1 of 5 forget rows"),
        (lambda rows: [{**rows[0], "prompt": "Q: What?"}, *rows[1:]], "1 of 5 forget rows"),
        (lambda rows: text_rows(FACTS), "needs a set 'forget' with 'perturbed'"),
    ],
)
def test_an_oracle_of_other_rows_is_refused_before_the_model_is_used(tokenizer, change, message):
    rows = with_wrong_answers(text_rows(FACTS))
    oracle = {row_key(row): 1.0 for row in rows}
    with pytest.raises(ValueError, match=message):
        evaluate(torch.nn.Linear(1, 1), tokenizer, {"forget": change(rows)}, oracle=oracle)


def test_an_oracle_needs_truth_ratios(memorized, tokenizer):
    records = evaluate(memorized, tokenizer, {"retain": with_wrong_answers(text_rows(FACTS))}, generate=False).records
    with pytest.raises(ValueError, match="forget set with perturbed"):
        oracle_truth_ratios(records)


def test_model_utility_needs_all_nine(memorized, tokenizer):
    result = evaluate(memorized, tokenizer, full_sets(), max_new_tokens=12)
    assert result.metrics["model_utility"] == pytest.approx(model_utility(result.metrics))
    assert "model_utility" not in evaluate(memorized, tokenizer, full_sets(), generate=False).metrics
    for name in ("retain", "real_authors", "world_facts"):
        sets = {key: rows for key, rows in full_sets().items() if key != name}
        assert "model_utility" not in evaluate(memorized, tokenizer, sets, max_new_tokens=2).metrics
    sets = {**full_sets(), "retain": text_rows(UNSEEN)}
    assert "model_utility" not in evaluate(memorized, tokenizer, sets, max_new_tokens=2).metrics


def test_records_read_back_from_disk_give_the_same_metrics(memorized, tokenizer, tmp_path):
    sets = full_sets()
    oracle = {row_key(row): 0.5 + i for i, row in enumerate(sets["forget"])}
    result = evaluate(memorized, tokenizer, sets, max_new_tokens=5, oracle=oracle)
    append_jsonl(tmp_path / "records.jsonl", result.records)
    assert aggregate(read_jsonl(tmp_path / "records.jsonl"), oracle) == (result.metrics, result.notes)


# --- privacy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [text_rows, chat_rows])
def test_redacted_records_hold_no_text(memorized, tokenizer, make):
    open_, closed = (
        evaluate(memorized, tokenizer, full_sets(make), max_new_tokens=12, redact=redact) for redact in (False, True)
    )
    dump = json.dumps([closed.records, closed.metrics, closed.notes])
    secrets = [w for r in open_.records for w in f"{r['prompt']} {r['gold']} {r['generation']}".split() if len(w) > 3]
    assert len(secrets) > 50
    assert [word for word in secrets if word in dump] == []
    assert closed.metrics == open_.metrics
    assert "Paris" in json.dumps(open_.records)


def test_errors_do_not_quote_private_text(memorized, tokenizer):
    rows = [{"prompt": "Zanzibar " * 20, "completion": " secret"}]
    with pytest.raises(RowError) as caught:
        evaluate(memorized, tokenizer, {"forget": rows}, max_length=8)
    assert "Zanzibar" not in str(caught.value)
    assert "forget row 0, answer: the prompt alone fills max_length=8" in str(caught.value)


# --- bad input and notes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({}, "no set to evaluate"),
        ({"forget": []}, "'forget' is empty"),
        ({"forget": [{"prompt": "a"}]}, "forget row 0 has no 'completion'"),
        ({"forget": [{"prompt": None, "completion": "b"}]}, "forget row 0 has no 'prompt'"),
        ({"real_authors": text_rows(FACTS)}, "real_authors rows have no 'perturbed'"),
        (
            {"retain": with_wrong_answers(text_rows(FACTS)) + text_rows(UNSEEN)},
            "retain: rows 0 and 5 differ in having 'perturbed'",
        ),
    ],
)
def test_unusable_sets_are_refused_before_the_model_is_used(tokenizer, sets, message):
    with pytest.raises(ValueError, match=message):
        evaluate(torch.nn.Linear(1, 1), tokenizer, sets)


def test_a_broken_completion_is_named(memorized, tokenizer):
    rows = with_wrong_answers(text_rows(FACTS))
    rows[3]["perturbed"] = ["fine", "  "]
    with pytest.raises(RowError, match="forget row 3, perturbed answer: the completion is empty"):
        evaluate(memorized, tokenizer, {"forget": rows})


def test_broken_weights_are_an_error_not_a_number(tokenizer):
    model = tiny_lm()
    model.lm_head.weight.data[7] = math.nan
    with pytest.raises(ValueError, match="forget row 0 no finite log-probability"):
        evaluate(model, tokenizer, {"forget": text_rows(FACTS)}, generate=False)


def test_cut_answers_are_counted_and_have_no_eos(memorized, tokenizer):
    rows = text_rows(FACTS)
    lengths = [tokenize_row(row, tokenizer, max_length=None) for row in rows]
    limit = sorted(len(t["prompt_ids"]) + len(t["completion_ids"]) for t in lengths)[3]  # one row is longer
    result = evaluate(memorized, tokenizer, {"forget": rows}, max_length=limit, generate=False)
    assert result.notes == ["forget: 1 of 5 answers were cut at max_length (and have no EOS)"]
    cut = next(i for i, r in enumerate(result.records) if r["truncated"])
    kept = limit - len(lengths[cut]["prompt_ids"])
    assert result.records[cut]["tokens"] == kept
    expected = -logps_by_hand(memorized, lengths[cut])[:kept].mean().item()
    assert result.records[cut]["nll"] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_answers_that_rouge_cannot_read_are_unscored_not_zero(memorized, tokenizer):
    rows = [
        {
            "prompt": "Question: What is the capital of France?\nAnswer:",
            "completion": " The capital of France is Paris.",
        },
        {"prompt": "Question: 東京?\nAnswer:", "completion": " 東京"},
    ]
    result = evaluate(memorized, tokenizer, {"forget": rows}, max_new_tokens=20)
    assert result.metrics["forget/rouge"] == 1.0
    assert result.notes == ["forget: 1 of 2 answers have no a-z or 0-9, which ROUGE needs, and have no ROUGE"]
    alone = evaluate(memorized, tokenizer, {"forget": rows[1:]}, max_new_tokens=5)
    assert "forget/rouge" not in alone.metrics


def test_a_missing_paraphrase_is_replaced_by_the_answer_and_noted(memorized, tokenizer):
    sets = {name: with_wrong_answers(text_rows(FACTS), paraphrase=False) for name in ("forget", "real_authors")}
    result = evaluate(memorized, tokenizer, sets, generate=False)
    assert result.notes == ["forget: 5 of 5 rows have no paraphrase; their truth ratio uses the answer itself"]
    for record in result.records:
        assert record["paraphrase_nll"] == record["nll"]


def test_a_dataset_with_null_columns_is_read_like_a_list(memorized, tokenizer):
    from datasets import Dataset

    rows = text_rows(FACTS)
    data = Dataset.from_list([{**row, "paraphrase": None, "perturbed": []} for row in rows])
    listed = evaluate(memorized, tokenizer, {"forget": rows}, generate=False)
    assert_same(listed, evaluate(memorized, tokenizer, {"forget": data}, generate=False))


# --- samples and directions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("forget/probability", "lower"),
        ("forget/rouge", "lower"),
        ("forget/extraction_strength", "lower"),
        ("forget/nll", "higher"),
        ("forget/truth_ratio", None),
        ("retain/probability", "higher"),
        ("retain/nll", "lower"),
        ("real_authors/truth_ratio", "higher"),
        ("model_utility", "higher"),
        ("forget_quality", "higher"),
        ("forget_quality_log10", "higher"),
        ("min_k_auc", None),
    ],
)
def test_directions(name, direction):
    assert better(name) == direction

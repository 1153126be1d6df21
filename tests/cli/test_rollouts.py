"""`negtune rollouts` and `negtune verify`, as typed."""

from __future__ import annotations

import pytest

from negtune.cli.main import main
from negtune.models.tiny import save_tiny
from negtune.records import append_jsonl, read_jsonl, write_jsonl
from negtune.rollouts.store import RecordStore
from negtune.verifiers.exact import ExactVerifier
from negtune.verifiers.verdict import Verdict

GENERATE = ["rollouts", "generate", "--model", "tiny", "--store", "s", "--prompts"]
ROWS = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(3)]


@pytest.fixture
def files(tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    return tmp_path


def generate(files, *more: str) -> int:
    base = ["rollouts", "generate", "--model", "tiny", "--prompts", str(files / "prompts.jsonl")]
    return main([*base, "--store", str(files / "store"), "--max_tokens", "4", *more])


def test_generate_draws_once_and_goes_on(files, capsys):
    assert generate(files, "--num_generations", "2") == 0
    assert "6 drawn, 6 in" in capsys.readouterr().out
    assert generate(files, "--num_generations", "3") == 0  # the third of each is new
    assert "3 drawn, 9 in" in capsys.readouterr().out
    records = list(RecordStore(files / "store"))
    assert {r["columns"]["answer"] for r in records} == {"0", "2", "4"}
    assert len({r["policy"] for r in records}) == 1
    assert main(["rollouts", "stats", "--store", str(files / "store")]) == 0
    assert "9 rollouts of 3 prompts" in capsys.readouterr().out


def test_other_weights_behind_the_same_path_are_another_policy(files, capsys):
    for seed in (0, 1, 1):
        save_tiny(files / "model", seed=seed)
        assert generate(files, "--model", str(files / "model")) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if "drawn" in line] == [
        f"3 drawn, 3 in {files / 'store'}",
        f"3 drawn, 6 in {files / 'store'}",
        f"0 drawn, 6 in {files / 'store'}",
    ]


def test_errors_of_ours_are_one_line_and_faults_of_others_are_not(files, capsys, monkeypatch):
    append_jsonl(
        files / "rollouts-00000-00000.jsonl",
        [
            {
                "key": str(i),
                "prompt": "p",
                "prefix": "",
                "text": "4",
                "finish_reason": "stop",
                "columns": {"answer": "4"},
            }
            for i in range(60)
        ],
    )
    verify = ["rollouts", "verify", "--store", str(files), "--verifier", "exact"]
    monkeypatch.setattr(ExactVerifier, "verify", lambda self, *args, **columns: [Verdict("unscored")] * 60)
    assert main(verify) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("negtune: error: 60 of 60")

    def fault(self, *args, **columns):
        raise RuntimeError("a fault")

    monkeypatch.setattr(ExactVerifier, "verify", fault)
    with pytest.raises(RuntimeError, match="a fault"):
        main(verify)


def test_verify_scores_what_ended_by_itself(files, capsys):
    texts = ["The answer is 4.", "The answer is 5.", "It is not 4"]
    rollout = {"prompt": "p", "prefix": "", "completion_ids": [1], "policy": "x", "columns": {"answer": "4"}}
    rollouts = [{**rollout, "key": str(i), "text": t, "finish_reason": "stop"} for i, t in enumerate(texts)]
    (files / "store").mkdir()
    append_jsonl(
        files / "store" / "rollouts-00000-00000.jsonl",
        [*rollouts, {**rollouts[0], "key": "cut", "finish_reason": "length"}],
    )
    assert main(["rollouts", "verify", "--store", str(files / "store"), "--verifier", "math", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "4 scored" in out
    assert "math-auto:answer: correct 1, wrong 2, unscored 1; correct of scored 0.333" in out
    assert main(["rollouts", "verify", "--store", str(files / "store"), "--verifier", "math", "--workers", "1"]) == 0
    assert "0 scored" in capsys.readouterr().out


def test_audit_gives_both_error_rates_by_bucket_with_examples(files, capsys):
    labelled = [
        {"completion": "yes", "answer": "yes", "right": True, "level": 1},
        {"completion": "Yes", "answer": "yes", "right": True, "level": 2},  # exact wants the case too
        {"completion": "no", "answer": "no", "right": False, "level": 2},  # a wrong gold text
        {"completion": "x", "answer": "yes", "right": False, "level": 1},
    ]
    write_jsonl(files / "labelled.jsonl", labelled)
    base = ["verify", "audit", "--rollouts", str(files / "labelled.jsonl"), "--truth", "right", "--verifier", "exact"]
    assert main([*base, "--by", "level"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split()[:3] == ["all", "4", "0.500"]
    assert out[2].split()[:3] == ["1", "2", "0.000"]
    assert out[3].split()[:3] == ["2", "2", "1.000"]
    assert "false positive, row 3" in out[4]
    assert "false negative, row 2" in out[5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rollouts", "stats", "--store", "nowhere"], "nowhere has no rollouts"),
        (["rollouts", "verify", "--store", "nowhere", "--verifier", "exact"], "nowhere has no rollouts"),
        ([*GENERATE, "no.jsonl"], "No such file"),
        ([*GENERATE, "prompts.jsonl", "--engine", "server"], "--engine server needs --url http://host:port"),
        ([*GENERATE, "prompts.jsonl", "--url", "http://127.0.0.1:1"], "--url needs --engine server"),
        (
            [*GENERATE, "prompts.jsonl", "--engine", "server", "--url", "http://127.0.0.1:1", "--api_key_env", "NO"],
            "--api_key_env NO: no such environment variable",
        ),
        ([*GENERATE, "prompts.jsonl", "--engine", "server", "--url", "127.0.0.1:1"], "url must be http://host:port"),
        ([*GENERATE, "prompts.jsonl", "--max_model_len", "9"], "--max_model_len is for --engine vllm"),
        (
            [*GENERATE, "prompts.jsonl", "--engine", "server", "--url", "http://127.0.0.1:1", "--load_in_4bit"],
            "--load_in_4bit has no meaning for a server",
        ),
    ],
)
def test_mistakes_are_one_line(files, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(files)
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rollouts", "genrate"], "did you mean generate?"),
        (["rollouts"], "ACTION"),
        ([*GENERATE, "p.jsonl", "--batch_size", "0"], "--batch_size: must be at least 1, got 0"),
        ([*GENERATE, "p.jsonl", "--limit", "-1"], "--limit: must be at least 1, got -1"),
        ([*GENERATE, "p.jsonl", "--num_generations", "0"], "--num_generations: must be at least 1, got 0"),
    ],
)
def test_wrong_actions_are_named(capsys, arguments, words):
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err


def test_rows_without_prompt_or_truth_are_named(files, capsys):
    write_jsonl(files / "prompts.jsonl", [ROWS[0], {"answer": "1"}])
    assert generate(files) == 1
    assert "row 2: no prompt; the row has answer" in capsys.readouterr().err
    for prompt in (7, {"role": "user"}, [{"role": "user", "content": None}]):
        write_jsonl(files / "prompts.jsonl", [ROWS[0], {"prompt": prompt}])
        assert generate(files) == 1
        assert "row 2: the prompt must be text or a list of messages" in capsys.readouterr().err
    write_jsonl(files / "l.jsonl", [{"completion": "a", "right": "yes"}])
    assert (
        main(["verify", "audit", "--rollouts", str(files / "l.jsonl"), "--truth", "right", "--verifier", "exact"]) == 1
    )
    assert "row 1: right must be true or false, it is 'yes'" in capsys.readouterr().err
    assert not (files / "store").exists()
    assert read_jsonl(files / "l.jsonl")

import pytest
import torch

from negtune.data.arithmetic import START_DIFFICULTY, chains, prompt_row
from negtune.data.completions import tokenize_row
from negtune.models.arithmetic import START_TRAINING, arithmetic_lm, arithmetic_tokenizer, save_arithmetic


def test_tokenizer_round_trips_the_task_and_any_other_text():
    tokenizer = arithmetic_tokenizer()
    texts = [row["prompt"] + row["completion"] for row in map(prompt_row, chains(50))]
    for text in [*texts, "naïve 世界 \t\n\n 3.14 <tag> 'quoted'", "-7 -12 = -19\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_each_digit_and_each_text_between_digits_is_one_token():
    tokenizer = arithmetic_tokenizer()
    prompt = "Start with 4. Add 13. Subtract 1. Multiply by 2. Multiply by 5. Add 1. What is the result?\n"
    pieces = [tokenizer.decode([i]) for i in tokenizer(prompt)["input_ids"]]
    assert pieces == [
        *("Start with ", "4", ". Add ", "1", "3", ". Subtract ", "1", ". Multiply by ", "2", ". Multiply by "),
        *("5", ". Add ", "1", ". What is the result?", "\n"),
    ]
    solution = "4 + 13 = 17\n17 - 1 = 16\n4 * 2 = 8\n#### 8"
    pieces = [tokenizer.decode([i]) for i in tokenizer(solution)["input_ids"]]
    assert pieces == [
        *("4", " + ", "1", "3", " = ", "1", "7", "\n", "1", "7", " - ", "1", " = ", "1", "6", "\n"),
        *("4", " * ", "2", " = ", "8", "\n", "#### ", "8"),
    ]


def test_a_prefix_that_ends_with_a_line_is_a_prefix_of_the_tokens():
    tokenizer = arithmetic_tokenizer()
    for row in map(prompt_row, chains(50)):
        whole = tokenizer(row["completion"])["input_ids"]
        for end in (i + 1 for i, character in enumerate(row["completion"]) if character == "\n"):
            prefix = tokenizer(row["completion"][:end])["input_ids"]
            assert whole[: len(prefix)] == prefix


def test_a_solution_ends_with_one_eos_that_is_not_the_pad_token():
    tokenizer = arithmetic_tokenizer()
    ids = tokenize_row(prompt_row(chains(1)[0]), tokenizer)["completion_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_tokenizer_and_model_agree_and_vllm_can_serve_the_heads():
    model, tokenizer = arithmetic_lm(), arithmetic_tokenizer()
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert model.config.head_dim == 32
    assert sum(p.numel() for p in model.parameters()) == 701_568


def test_size_and_seed_reach_the_weights():
    small = arithmetic_lm(hidden=64, layers=2)
    assert tuple(small.model.layers[-1].self_attn.q_proj.weight.shape) == (64, 64)
    assert len(small.model.layers) == 2
    again, other = (arithmetic_lm(seed, hidden=64, layers=2).model.embed_tokens.weight for seed in (0, 1))
    torch.testing.assert_close(small.model.embed_tokens.weight, again, rtol=0, atol=0)
    assert not torch.allclose(again, other)


@pytest.mark.parametrize("hidden", [0, 100])
def test_a_width_that_is_no_multiple_of_a_head_is_refused(hidden):
    with pytest.raises(ValueError, match=f"multiple of 32, the width of a head, got {hidden}"):
        arithmetic_lm(hidden=hidden)


def test_a_saved_folder_loads_offline_with_the_same_logits(tmp_path):
    from negtune.models.load import load_model

    model, tokenizer = load_model(save_arithmetic(tmp_path / "model", seed=3, hidden=64, layers=1))
    ids = tokenizer(prompt_row(chains(1)[0])["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = arithmetic_lm(3, hidden=64, layers=1)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    assert tokenizer.eos_token == "<|end|>"


def test_the_start_can_be_trained_without_cutting_a_row(tmp_path):
    from negtune.trainers.finetune import fine_tune

    base, rows = save_arithmetic(tmp_path / "base", hidden=32, layers=1), chains(200, difficulty=START_DIFFICULTY)
    tokenizer = arithmetic_tokenizer()
    lengths = [tokenize_row(prompt_row(row), tokenizer) for row in rows]
    longest = max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in lengths)
    assert longest <= START_TRAINING["max_length"]
    folder = fine_tune(str(base), [prompt_row(rows[0])], tmp_path / "start", **{**START_TRAINING, "epochs": 1})
    assert (folder / "model.safetensors").is_file()

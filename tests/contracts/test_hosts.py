"""The names of TRL, transformers and sentence-transformers this project leans on.

A failure here says what moved before anything else breaks.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from dataclasses import fields

import pytest
import torch
from transformers import Trainer, TrainingArguments

from negtune import AdvantageConfig, PreferenceConfig, UnlearningConfig
from negtune._trl_compat import BaseConfig, BaseTrainer
from negtune.trainers.config import CHECKPOINTING


def test_the_base_classes_are_the_hosts():
    assert issubclass(BaseTrainer, Trainer)
    assert issubclass(BaseConfig, TrainingArguments)


def test_hooks_exist_with_the_arguments_we_override():
    wanted = {
        "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
        "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
        "_get_train_sampler": ["self", "train_dataset"],
        "log": ["self", "logs", "start_time"],
        "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
        "save_model": ["self", "output_dir", "_internal_call"],
        "_save_checkpoint": ["self", "model", "trial"],
        "_get_output_dir": ["self", "trial"],
    }
    for name, parameters in wanted.items():
        assert list(inspect.signature(getattr(BaseTrainer, name)).parameters) == parameters, name
    assert list(inspect.signature(BaseTrainer.create_model_card).parameters) == [
        "self", "model_name", "dataset_name", "tags",
    ]  # fmt: skip
    assert callable(BaseTrainer._send_telemetry)


def test_the_host_divides_by_accumulation_steps_when_told_so():
    """`loss_is_scaled_for_ga = False`, or below transformers 5.19 `model_accepts_loss_kwargs = False`."""
    source = inspect.getsource(Trainer.training_step) + inspect.getsource(BaseTrainer.__init__)
    assert "loss_is_scaled_for_ga" in source
    assert "current_gradient_accumulation_steps" in source


def test_the_epoch_callback_runs_before_the_batches_of_the_epoch_are_drawn():
    source = inspect.getsource(Trainer._inner_training_loop) + inspect.getsource(Trainer._run_epoch)
    assert source.index("on_epoch_begin") < source.index("iter(train_dataloader)")


def test_the_config_parses_json_dictionaries():
    assert "model_init_kwargs" not in BaseConfig._VALID_DICT_FIELDS
    assert isinstance(BaseConfig._VALID_DICT_FIELDS, list)


def test_a_data_loader_of_our_own_is_asked_one_step_at_a_time():
    """Rounds are drawn when their batches are asked for: a host that fetched ahead would draw from old weights."""
    source = inspect.getsource(Trainer._run_epoch)
    assert "self.get_batch_samples(epoch_iterator, num_batches, self.args.device)" in source
    assert "self.args.ignore_data_skip" in source


def test_grpo_has_the_two_hooks_that_steps_need():
    from trl import GRPOTrainer

    wanted = {
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_generate_and_score_completions": ["self", "inputs"],
    }
    for name, parameters in wanted.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == parameters, name
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert source.index("self._calculate_rewards(") < source.index('"advantages": advantages')
    assert "unscorable_mask = torch.isnan(rewards_per_func).all(dim=1)" in source


def test_the_grpo_loss_takes_advantages_per_token():
    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert "advantages.dim() == 1" in source
    assert "advantages.unsqueeze(1)" in source


def test_the_grpo_loss_asks_for_its_log_probabilities_once_and_they_come_first():
    """They are what is logged by sign; `compute_loss` and `log` are the hosts' public hooks."""
    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert source.count("self._get_per_token_logps_and_entropies(") == 1
    assert "per_token_logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(" in source
    wanted = ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert list(inspect.signature(GRPOTrainer.compute_loss).parameters) == wanted
    assert "return self._compute_loss(model, inputs)" in inspect.getsource(GRPOTrainer.compute_loss)
    assert list(inspect.signature(GRPOTrainer.log).parameters) == ["self", "logs", "start_time"]
    assert "for key, val in self._metrics[mode].items()" in inspect.getsource(GRPOTrainer.log)


def test_a_grpo_loss_in_evaluation_mode_changes_nothing_but_the_metrics():
    """Gradients by sign are measured with it. Anything else that it writes to itself would have to be put back."""
    import re

    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer._compute_loss)
    written = set(re.findall(r"^ *self\.(\w+) = ", source, re.M))
    assert written == {"entropy_coef", "_entropy_window_stats", "_last_world_entropy"}
    assert 'if self.use_adaptive_entropy and mode == "train":' in source
    assert 'mode = "train" if self.model.training else "eval"' in source


def test_the_colocated_engine_is_reached_where_we_hand_weights_over():
    from trl.generation import vllm_generation

    source = inspect.getsource(vllm_generation)
    assert "self.llm.llm_engine.model_executor.driver_worker.model_runner" in source
    assert "def _iter_named_params(self)" in source
    assert "self.llm.reset_prefix_cache()" in source


@pytest.mark.parametrize("config", [PreferenceConfig, UnlearningConfig, AdvantageConfig])
def test_recomputing_activations_is_one_setting_under_either_name_and_nobody_is_warned(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for given, wanted in (
            ({}, False),
            ({"gradient_checkpointing": True}, True),
            ({"gradient_checkpointing": False}, False),
            ({CHECKPOINTING: True}, True),
        ):
            args = config(output_dir="unused", use_cpu=True, **given)
            assert (args.gradient_checkpointing, getattr(args, CHECKPOINTING)) == (wanted, wanted), given


# --- sentence-transformers --------------------------------------------------------------------------------------------

needs_sentence_transformers = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None,
    reason="needs sentence-transformers: pip install 'negtune[retrieval]'",
)


def parameters(function):
    return list(inspect.signature(function).parameters)


@needs_sentence_transformers
def test_the_trainer_of_retrievers_has_the_hooks_we_override_and_call():
    from negtune import _st_compat

    host = _st_compat.BaseTrainer
    assert issubclass(host, Trainer)
    wanted = {
        "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
        "prediction_step": ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
        "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
        "log": ["self", "logs", "start_time"],
        "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
        "training_step": ["self", "model", "inputs", "num_items_in_batch"],
        "get_train_dataloader": ["self"],
        "get_eval_dataloader": ["self", "eval_dataset"],
        "_prepare_inputs": ["self", "inputs"],
        "get_default_loss": ["self", "model"],
        "add_model_card_callback": ["self", "default_args_dict"],
        "override_model_in_loss": ["self", "loss", "model"],
    }
    for name, names in wanted.items():
        assert parameters(getattr(host, name)) == names, name
    passed = {"model", "args", "train_dataset", "eval_dataset", "loss", "evaluator", "data_collator"}
    assert passed | {"processing_class", "callbacks", "optimizers"} <= set(parameters(host.__init__))
    assert host.training_args_class is _st_compat.BaseTrainingArguments


@needs_sentence_transformers
def test_the_trainer_of_retrievers_asks_a_collator_for_its_labels_and_a_stream_for_its_columns():
    """`CandidateCollator.valid_label_columns`; and what `candidate_rows` casts streams for."""
    from negtune._st_compat import BaseTrainer

    asked = set(inspect.getsource(BaseTrainer._build_dataloader).split("data_collator.")[1:])
    assert {name.split(",")[0] for name in asked} == {"valid_label_columns"}
    assert "isinstance(dataset, IterableDataset) and dataset.column_names is None" in inspect.getsource(BaseTrainer)


@needs_sentence_transformers
def test_a_wrapped_model_takes_the_place_of_the_losss_own():
    from negtune._st_compat import BaseTrainer
    from tests.retrieval.tiny_rankers import static_encoder

    loss, wrapper = torch.nn.Module(), torch.nn.Module()
    loss.model = static_encoder()
    wrapper.module = loss.model
    assert BaseTrainer.override_model_in_loss(None, loss, wrapper) is loss
    assert loss.model is wrapper
    assert wrapper.preprocess == wrapper.module.preprocess


@needs_sentence_transformers
def test_training_arguments_of_retrievers_are_the_hosts():
    from negtune._st_compat import BaseTrainingArguments

    assert issubclass(BaseTrainingArguments, TrainingArguments)
    assert isinstance(BaseTrainingArguments._VALID_DICT_FIELDS, list)
    assert "model_init_kwargs" not in BaseTrainingArguments._VALID_DICT_FIELDS
    assert "prompts" in {field.name for field in fields(BaseTrainingArguments)}
    assert BaseTrainingArguments(output_dir="unused", use_cpu=True).prediction_loss_only is True


@needs_sentence_transformers
def test_an_evaluator_is_called_as_ours_expects():
    from negtune._st_compat import BaseEvaluator, BaseTrainer

    assert parameters(BaseEvaluator.__call__) == ["self", "model", "output_path", "epoch", "steps"]
    assert vars(BaseEvaluator()) == {"greater_is_better": True, "primary_metric": None}
    call = "self.model, output_path=output_path, epoch=self.state.epoch, steps=self.state.global_step"
    assert call in inspect.getsource(BaseTrainer.evaluation_loop)


@needs_sentence_transformers
def test_the_gradient_cache_asks_for_mini_batches_and_for_the_loss_of_all():
    from negtune._st_compat import CachedLossMixin

    wanted = {
        "embed_minibatch": [
            *("self", "sentence_feature", "begin", "end", "with_grad", "copy_random_state", "random_state"),
        ],
        "embed_minibatch_iter": [
            *("self", "sentence_feature", "with_grad", "copy_random_state", "random_states", "ranges"),
        ],
        "calculate_loss": ["self", "reps", "labels", "with_backward"],
        "forward_cached": ["self", "sentence_features", "labels"],
    }
    for name, names in wanted.items():
        assert parameters(getattr(CachedLossMixin, name)) == names, name
    assert CachedLossMixin.uses_gradient_cache is True
    assert CachedLossMixin.mini_batch_num_tokens is None

    class Halves(CachedLossMixin, torch.nn.Module):
        mini_batch_size, asked = 2, ()

        def embed_minibatch(self, sentence_feature, begin, end, with_grad, copy_random_state, random_state=None):
            self.asked = (*self.asked, (begin, end, with_grad, copy_random_state, random_state))
            return sentence_feature["input_ids"][begin:end] * weight, f"state {begin}"

        def calculate_loss(self, reps, labels, *, with_backward=False):
            loss = torch.cat([r for column in reps for r in column]).square().sum()
            if with_backward:
                loss.backward()
            return loss.detach()

    weight, halves = torch.tensor(2.0, requires_grad=True), Halves()
    halves.model = torch.nn.Identity()
    (halves.forward_cached([{"input_ids": torch.tensor([1.0, 2.0, 3.0])}]) / 4).backward()
    assert halves.asked == (
        *((0, 2, False, True, None), (2, 3, False, True, None)),
        *((0, 2, True, False, "state 0"), (2, 3, True, False, "state 2")),
    )
    assert weight.grad == 2 * 2 * (1 + 4 + 9) / 4  # of sum (w x)^2 at w = 2, by what the backward pass came with


@needs_sentence_transformers
def test_a_random_state_is_replayed_and_what_is_outside_goes_on():
    from negtune._st_compat import RandContext

    state = RandContext(torch.zeros(1))
    first = torch.rand(3)
    going_on = torch.get_rng_state()
    with state:
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), going_on)


@needs_sentence_transformers
def test_a_mini_batch_is_a_slice_without_the_padding_that_it_shares():
    from negtune._st_compat import create_minibatch

    ids = torch.tensor([[5, 0, 0], [6, 7, 0], [8, 0, 0], [9, 9, 9]])
    part = create_minibatch({"input_ids": ids, "attention_mask": (ids > 0).long(), "task": "query"}, 1, 3)
    assert part["input_ids"].tolist() == [[6, 7], [8, 0]]
    assert part["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert part["task"] == "query"


@needs_sentence_transformers
def test_columns_are_embedded_one_by_one_where_they_cannot_be_joined():
    from negtune._st_compat import embed_columns, has_static_embedding_input
    from tests.retrieval.tiny_rankers import static_encoder

    assert parameters(embed_columns) == ["model", "features_list", "separate_first"]
    assert parameters(has_static_embedding_input) == ["model"]
    model = static_encoder()
    assert has_static_embedding_input(model) is True
    found = embed_columns(model, [model.preprocess(["w1 w2"]), model.preprocess(["w3", "w4"])])
    for got, texts in zip(found, (["w1 w2"], ["w3", "w4"]), strict=True):
        torch.testing.assert_close(got, model.encode(texts, convert_to_tensor=True))


@needs_sentence_transformers
def test_transformers_have_no_static_embedding(tmp_path):
    from negtune._st_compat import MultiVectorEncoder, has_static_embedding_input
    from tests.retrieval.tiny_rankers import bi_encoder, multi_vector

    assert has_static_embedding_input(bi_encoder(tmp_path)) is False
    model = multi_vector(tmp_path / "tokens")
    assert isinstance(model, MultiVectorEncoder)
    assert has_static_embedding_input(model) is False
    features = model.preprocess(["w1 w2"], task="document")
    found = model(dict(features), task="document")
    assert found["token_embeddings"].shape[:2] == found["attention_mask"].shape


@needs_sentence_transformers
def test_a_module_of_ours_is_loaded_by_its_class_and_others_still_ask_for_trust(tmp_path):
    from sentence_transformers import SentenceTransformer

    from negtune._st_compat import Module, Normalize, load_with_modules
    from tests.retrieval.tiny_rankers import static_encoder

    class Ours(Module):
        config_keys = ["size"]

        def __init__(self, size):
            super().__init__()
            self.size = size

        def forward(self, features):
            return features

        def save(self, output_path, *args, safe_serialization=True, **kwargs):
            self.save_config(output_path)

    assert parameters(Module.load_config)[:2] == ["model_name_or_path", "subfolder"]
    assert {"subfolder", "token", "cache_folder", "revision", "local_files_only", "model"} <= set(
        parameters(Module.load_torch_weights)
    )
    assert Normalize().module_input_name == "sentence_embedding"
    SentenceTransformer(modules=[static_encoder()[0], Ours(3)]).save_pretrained(str(tmp_path), create_model_card=False)
    kind = f"{Ours.__module__}.Ours"
    loaded = load_with_modules(str(tmp_path), {kind: Ours}, trust_remote_code=False)
    assert (type(loaded[-1]), loaded[-1].size) == (Ours, 3)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_with_modules(str(tmp_path), {}, trust_remote_code=False)


@needs_sentence_transformers
def test_max_sim_of_pairs_leaves_out_what_is_masked():
    from negtune._st_compat import colbert_scores_pairwise

    # query tokens x and y; document tokens x and (0.5, 0.5): x finds 1, y finds 0.5, or 0 where the second is masked
    query, document = torch.eye(2)[None], torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
    seen, masks = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[True, False]])
    for queries_mask, documents_mask, wanted in ((seen, seen, 1.5), (seen, masks, 1.0), (masks, seen, 1.0)):
        found = colbert_scores_pairwise(query, document, queries_mask=queries_mask, documents_mask=documents_mask)
        assert found.tolist() == [wanted]


@needs_sentence_transformers
def test_the_three_kinds_of_model_share_what_the_trainer_asks_of_them():
    from sentence_transformers import CrossEncoder, SentenceTransformer

    from negtune._st_compat import MultiVectorEncoder

    kinds = (SentenceTransformer, CrossEncoder, MultiVectorEncoder)
    for kind in kinds:
        assert [other for other in kinds if issubclass(kind, other)] == [kind]
        assert parameters(kind.preprocess) == ["self", "inputs", "prompt", "kwargs"]
        for name in ("transformers_model", "has_peft_compatible_model", "add_adapter"):
            assert hasattr(kind, name), (kind, name)

"""The TRL and transformers names this project leans on. A failure here says what moved before anything else breaks."""

from __future__ import annotations

import inspect
import warnings

import pytest
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

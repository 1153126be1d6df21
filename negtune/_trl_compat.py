"""Every private TRL and transformers name this project touches; `tests/contracts` pins them.

- `BaseTrainer`, `BaseConfig`: what TRL's own trainers extend. Used for the accumulation shim and TRL's defaults.
- `loss_is_scaled_for_ga`: who divides by gradient accumulation steps. False: the host divides.
- `GRPOTrainer`'s two hooks that `trainers.grpo` overrides, `_calculate_rewards` and `_generate_and_score_completions`;
  `_get_per_token_logps_and_entropies` and `_metrics`, through which it learns of the loss's log-probabilities and tells
  of them; and `vllm_generation`, whose weights it hands over on a CPU.
"""

from __future__ import annotations

from typing import Any

import trl
from packaging.version import Version

if not Version("1.16") <= Version(trl.__version__) < Version("1.17"):
    raise ImportError(
        f"negtune is tested with trl>=1.16,<1.17 and found {trl.__version__}; run: pip install 'trl>=1.16,<1.17'"
    )

from trl.trainer.base_config import _BaseConfig as BaseConfig
from trl.trainer.base_trainer import _BaseTrainer as BaseTrainer

__all__ = ["BaseConfig", "BaseTrainer", "sync_weights_on_cpu"]


def sync_weights_on_cpu(generation: Any) -> None:
    """What `VLLMGeneration.sync_weights` does in colocate mode, in the one way that vLLM 0.31 has on a CPU.

    TRL loads parameter by parameter, which fails there: linear layers drop their weight once they have packed it. An
    adapter that was merged for this is taken out again whatever happens.
    """
    from negtune.rollouts.worker import WorkerExtension

    worker = generation.llm.llm_engine.model_executor.driver_worker
    parameters = generation._iter_named_params()
    try:
        worker.model_runner.reload_weights(weights_iterator=parameters)
        for _ in parameters:  # to its end, where adapters are taken out again
            pass
    except BaseException:
        if hasattr(generation.model, "unmerge_adapter"):
            generation.model.unmerge_adapter()
        raise
    WorkerExtension.pack_linear_layers_again(worker)
    generation.llm.reset_prefix_cache()

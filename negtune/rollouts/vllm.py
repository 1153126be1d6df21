"""Sampling with vLLM in this process: `vllm.LLM` with its arguments passed through.

An adapter is served as a new adapter each time it changes: a fresh name, number and folder. vLLM keeps cached prefixes
by adapter, and a reloaded name would be answered from prefixes of the old weights. Full fine-tuning replaces the
engine's weights and empties its prefix cache.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from negtune.models.policy import is_peft
from negtune.models.structure import causal_lm, unwrapped
from negtune.models.vllm_engine import emptied_on_error, leave_others_alone, start_engine
from negtune.rollouts.adapters import lora_rank, refuse_unservable, save_adapter
from negtune.rollouts.attest import served_weights_hash
from negtune.rollouts.sampler import (
    Request,
    Rollout,
    Sampler,
    SamplingParams,
    eos_token_ids,
    fitting_token_ids,
    make_rollout,
)

ENGINE = "vllm"


class VLLMSampler(Sampler):
    """Draws with vLLM, from the weights that the last `update` handed over.

    Args:
        model: the model that is trained; the engine loads the checkpoint it came from (its folder or hub id), then gets
            the weights it has now. LoRA: only the adapter is handed over.
        tokenizer: of the model.
        policy: version of the weights, for the record.
        checkpoint: folder or hub id to load instead of the model's own.
        folder: where adapters are kept for the engine; a temporary one by default.
        engine: further arguments of `vllm.LLM` (`max_model_len`, `tensor_parallel_size`, `enforce_eager`,
            `enable_sleep_mode` ...). `dtype` is the trained model's if not given: vLLM by itself would take bfloat16
            for a float32 model, and the two would differ by more than many a policy step. With LoRA on a GPU it has to
            be a half-precision one. `gpu_memory_utilization` is 0.3 if not given, as the trainer is on the same GPU.

    Raises:
        ValueError: vLLM cannot serve this model or adapter as it is trained; the message says what can.
        ModuleNotFoundError: vLLM is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        policy: str = "0",
        checkpoint: str | Path | None = None,
        folder: str | Path | None = None,
        **engine: Any,
    ) -> None:
        model = unwrapped(model)
        refuse_unservable(model, engine.get("quantization"))
        arguments = {**_defaults(model, checkpoint), **engine}
        _refuse_settings(arguments)
        self._quantization = arguments.get("quantization")
        self.dtype = getattr(torch, str(arguments["dtype"]), None)
        self._eos = eos_token_ids(tokenizer, causal_lm(model).generation_config)
        self._sleeps, self._asleep = bool(arguments.get("enable_sleep_mode")), False
        self.tokenizer, self.policy, self.served_hash = tokenizer, policy, ""
        self._temporary = tempfile.TemporaryDirectory(prefix="negtune-adapters-") if folder is None else None
        self._folder = Path(folder or self._temporary.name)
        self._session, self._version, self._adapter = uuid.uuid4().hex[:8], 0, None
        if _launched() > 1:
            # vLLM joins the group of the training processes, and fails where there is none yet.
            PartialState(cpu=not torch.cuda.is_available())
        self.llm = start_engine(**arguments)
        self._in_this_process = _in_this_process(arguments)
        if self._in_this_process:
            leave_others_alone(self.llm)
        if is_peft(model) and not torch.cuda.is_available():
            self.llm.collective_rpc("multiply_by_one_adapter")
        self.update(model, policy)

    def update(self, model: nn.Module, policy: str) -> None:
        """Sample from the weights that `model` has now, called `policy` from here on.

        Args:
            model: with the same adapter settings as at construction.
            policy: name of this version.
        """
        refuse_unservable(model, self._quantization)
        self._wake()
        model = unwrapped(model)
        if is_peft(model):
            self._serve_adapter(model)
        else:
            self._replace_weights(model)
        self.served_hash, self.policy = served_weights_hash(model), policy

    def draw(self, requests: Sequence[Request], params: SamplingParams) -> list[Rollout]:
        """See `Sampler.draw`. Raises ValueError, before anything is drawn, for a prompt that does not fit."""
        ids = fitting_token_ids(requests, self.tokenizer, self.llm.llm_engine.model_config.max_model_len)
        self._wake()
        with emptied_on_error(self.llm):
            outputs = self.llm.generate(
                [{"prompt_token_ids": row} for row in ids],
                [_engine_params(request, params, self._eos) for request in requests],
                lora_request=self._adapter,
                use_tqdm=False,
            )
        return [
            self._rollout(request, row, output.outputs[0], params)
            for request, row, output in zip(requests, ids, outputs, strict=True)
        ]

    def sleep(self) -> None:
        """Free the GPU for training until the next `update` or `draw`: weights wait in main memory, prefixes are lost.

        Does nothing unless the sampler was made with `enable_sleep_mode=True`, which vLLM has on CUDA only.
        """
        if self._sleeps and not self._asleep:
            self.llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """Delete the adapter's folder. The engine ends with the process."""
        if self._adapter is not None:
            shutil.rmtree(self._folder / self._adapter.lora_name, ignore_errors=True)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _rollout(self, request: Request, ids: list[int], output: Any, params: SamplingParams) -> Rollout:
        drawn = list(output.token_ids)
        return make_rollout(
            request,
            params,
            self,
            ENGINE,
            prompt_ids=ids,
            completion_ids=drawn,
            logps=[of_place[token].logprob for token, of_place in zip(drawn, output.logprobs, strict=True)],
            reason=str(output.finish_reason),
        )

    def _serve_adapter(self, model: Any) -> None:
        from vllm.lora.request import LoRARequest

        self._version += 1
        name = f"policy-{self._session}-{self._version}"
        path = save_adapter(model, self._folder / name)
        adapter = LoRARequest(name, self._version, str(path))
        try:
            self.llm.llm_engine.add_lora(adapter)  # whatever vLLM does not take, it says now
        except BaseException:
            shutil.rmtree(self._folder / name, ignore_errors=True)
            raise
        before, self._adapter = self._adapter, adapter
        if before is not None:
            self.llm.llm_engine.remove_lora(before.lora_int_id)
            shutil.rmtree(self._folder / before.lora_name, ignore_errors=True)

    def _replace_weights(self, model: nn.Module) -> None:
        if self._in_this_process:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": checkpoint_weights(model)})
        else:
            self._version += 1
            path = self._folder / f"weights-{self._session}-{self._version}"
            model.save_pretrained(path)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
            shutil.rmtree(path)
        if not torch.cuda.is_available():
            self.llm.collective_rpc("pack_linear_layers_again")
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept cached prefixes of the old weights: requests are still running in the engine")


def _defaults(model: nn.Module, checkpoint: str | Path | None) -> dict[str, Any]:
    """Arguments of `vllm.LLM` under which it computes what the trainer computes, and leaves room for it."""
    arguments: dict[str, Any] = {
        "model": str(checkpoint or causal_lm(model).config._name_or_path),
        "dtype": str(causal_lm(model).dtype).removeprefix("torch."),
        "logprobs_mode": "processed_logprobs",  # of the distribution tokens are drawn from
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": 0,
    }
    if torch.cuda.is_available():
        arguments["gpu_memory_utilization"] = 0.3
    else:
        arguments["enable_chunked_prefill"] = False  # with it a seeded request kills vLLM 0.31's engine on a CPU
        arguments["worker_extension_cls"] = "negtune.rollouts.worker.WorkerExtension"
    if _launched() > 1:
        arguments["distributed_executor_backend"] = "external_launcher"  # on this process's device
    if is_peft(model):
        arguments |= {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": lora_rank(model)}
    return arguments


def _refuse_settings(arguments: Mapping[str, Any]) -> None:
    if arguments["logprobs_mode"] != "processed_logprobs":
        raise ValueError("logprobs_mode must be processed_logprobs: rollouts record the distribution drawn from")
    if _launched() > 1 and _parts(arguments) > 1:
        raise ValueError(
            "several training processes have one engine each, which cannot be split over devices as well; leave "
            "tensor_parallel_size at 1, or sample from a server with VLLMServerSampler"
        )
    if torch.cuda.is_available():
        if arguments.get("enable_lora") and str(arguments["dtype"]).endswith("float32"):
            raise ValueError(
                "vLLM computes LoRA on a GPU in half precision only; load the model with dtype=torch.bfloat16, or give "
                "dtype='bfloat16' (the engine then differs from a float32 trainer by rounding), or use HFSampler"
            )
        return
    if arguments["enable_chunked_prefill"]:
        raise ValueError("enable_chunked_prefill must be off on a CPU: seeded requests would end vLLM 0.31's engine")
    if arguments.get("enable_sleep_mode"):
        raise ValueError("enable_sleep_mode needs a CUDA device; on a CPU there is no device memory to give back")


def _in_this_process(arguments: Mapping[str, Any]) -> bool:
    """Whether the worker is here, so that tensors can be handed to it."""
    executor = arguments.get("distributed_executor_backend") or "uni"
    one_worker = _parts(arguments) == 1 and executor in ("uni", "external_launcher")
    return one_worker and os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def _parts(arguments: Mapping[str, Any]) -> int:
    return arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)


def _launched() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def checkpoint_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and weights as a checkpoint has them, which vLLM loads: a tied weight once, fused experts apart."""
    kept = model.state_dict()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    weights |= {name: buffer for name, buffer in model.named_buffers() if name in kept}
    yield from revert_weight_conversion(model, weights).items()


def _engine_params(request: Request, params: SamplingParams, eos: list[int]) -> Any:
    from vllm import SamplingParams as EngineParams

    return EngineParams(
        n=1,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        max_tokens=params.max_tokens,
        stop=list(params.stop),
        stop_token_ids=eos,
        include_stop_str_in_output=True,
        seed=request.seed(params),
        logprobs=0,
        skip_special_tokens=False,
    )

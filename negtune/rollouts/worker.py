"""What vLLM's workers run for us on a CPU, in whichever process they are; see vLLM's `worker_extension_cls`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor


class WorkerExtension:
    """Methods of a worker, called by `collective_rpc`."""

    model_runner: Any

    def pack_linear_layers_again(self) -> None:
        """After new weights: vLLM 0.31 computes from packed copies, and does not renew a tied LM head's."""
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        for module in self.model_runner.model.modules():
            weight = getattr(module, "weight", None)
            if hasattr(module, "cpu_linear") and isinstance(weight, Tensor) and weight.numel():
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def multiply_by_one_adapter(self) -> None:
        """Where there is room for one adapter only, compute with it, not with a copy of it for every token.

        vLLM 0.31 gathers the adapter's weights by token on a CPU; with one adapter that is a matrix product. Measured
        in recipes/LOG.md.
        """
        from vllm.lora.ops.torch_ops import lora_ops
        from vllm.lora.punica_wrapper import punica_cpu

        for module in (lora_ops, punica_cpu):
            _replace(module, "bgmv_shrink", shrink)
            _replace(module, "bgmv_expand", expand)
            _replace(module, "bgmv_expand_slice", expand_slice)


def shrink(x: Tensor, weights: Tensor, out: Tensor, scaling: float = 1.0) -> None:
    """`out = scaling * x @ A.T` for `x` [tokens, in] and `weights` [1, (1,) rank, in]."""
    a = _only(weights, out)
    out[:, : a.shape[0]] = scaling * (x.to(out.dtype) @ a.T)


def expand(x: Tensor, weights: Tensor, out: Tensor, add_inputs: bool = True) -> None:
    """`out (+)= x @ B.T` for `x` [tokens, rank] and `weights` [1, (1,) out, rank]; either may be padded to be wider."""
    width = min(out.shape[1], weights.shape[-2])
    expand_slice(x, weights[..., :width, :], out, 0, width, add_inputs)


def expand_slice(x: Tensor, weights: Tensor, out: Tensor, start: int, width: int, add_inputs: bool = True) -> None:
    """`expand` into the columns `start` to `start + width`."""
    product, into = x.to(out.dtype) @ _only(weights, out).T, out[:, start : start + width]
    into.copy_(into + product if add_inputs else product)


def _only(weights: Tensor, out: Tensor) -> Tensor:
    return weights.reshape(weights.shape[-2:]).to(out.dtype)


def _replace(module: ModuleType, name: str, single: Any) -> None:
    """`single` where the weights hold one adapter, what was there before elsewhere."""
    gathered = getattr(module, name)

    def of_one_or_many(x: Tensor, weights: Tensor, out: Tensor, indices: Tensor, *more: Any, **named: Any) -> None:
        if weights.shape[0] == 1 and x.shape[0] == out.shape[0]:
            single(x, weights, out, *more, **named)
        else:
            gathered(x, weights, out, indices, *more, **named)

    setattr(module, name, of_one_or_many)

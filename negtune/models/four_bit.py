"""4-bit weights of bitsandbytes, kept such that they can be trained through."""

from __future__ import annotations

from torch import nn


def keep_gradients(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes from repacking the weights of `model` for inference, and take back where it has.

    On CPUs with AVX512-BF16 a `Linear4bit` in evaluation mode repacks its weights as soon as an input needs no
    gradient, and from then on multiplies with a kernel that has no backward pass (0.50): a training step after any
    evaluation or sample would take wrong gradients without a word.
    """
    for module in model.modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        module.support_avx512bf16_for_cpu = False
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                module.weight.data, state
            )
    return model

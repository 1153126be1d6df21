"""Fine-tune language models on what they should not say, do or retrieve.

Public names are loaded on first use, so that `import negtune` and the `negtune` command start without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from negtune.ops import SequenceLogps as SequenceLogps
    from negtune.retrieval.losses import RankingLoss as RankingLoss
    from negtune.rollouts.attest import attest as attest
    from negtune.rollouts.hf import HFSampler as HFSampler
    from negtune.rollouts.sampler import Rollout as Rollout
    from negtune.rollouts.sampler import SamplingParams as SamplingParams
    from negtune.rollouts.server import VLLMServerSampler as VLLMServerSampler
    from negtune.rollouts.store import RecordStore as RecordStore
    from negtune.rollouts.vllm import VLLMSampler as VLLMSampler
    from negtune.trainers.advantage import AdvantageConfig as AdvantageConfig
    from negtune.trainers.advantage import AdvantageTrainer as AdvantageTrainer
    from negtune.trainers.coupled import CoupledConfig as CoupledConfig
    from negtune.trainers.coupled import CoupledTrainer as CoupledTrainer
    from negtune.trainers.grpo import StepGRPOConfig as StepGRPOConfig
    from negtune.trainers.grpo import StepGRPOTrainer as StepGRPOTrainer
    from negtune.trainers.preference import PreferenceConfig as PreferenceConfig
    from negtune.trainers.preference import PreferenceTrainer as PreferenceTrainer
    from negtune.trainers.query_encoder import QueryEncoderConfig as QueryEncoderConfig
    from negtune.trainers.query_encoder import QueryEncoderTrainer as QueryEncoderTrainer
    from negtune.trainers.ranking import RankingConfig as RankingConfig
    from negtune.trainers.ranking import RankingTrainer as RankingTrainer
    from negtune.trainers.refresh import RefreshNegatives as RefreshNegatives
    from negtune.trainers.unlearning import UnlearningConfig as UnlearningConfig
    from negtune.trainers.unlearning import UnlearningTrainer as UnlearningTrainer
    from negtune.verifiers.code import CodeVerifier as CodeVerifier
    from negtune.verifiers.exact import ExactVerifier as ExactVerifier
    from negtune.verifiers.math import MathVerifier as MathVerifier
    from negtune.verifiers.reasoning import ReasoningGymVerifier as ReasoningGymVerifier
    from negtune.verifiers.verdict import Verdict as Verdict

__version__ = "0.1.0"

_HOMES = {
    "AdvantageConfig": "negtune.trainers.advantage",
    "AdvantageTrainer": "negtune.trainers.advantage",
    "CodeVerifier": "negtune.verifiers.code",
    "CoupledConfig": "negtune.trainers.coupled",
    "CoupledTrainer": "negtune.trainers.coupled",
    "ExactVerifier": "negtune.verifiers.exact",
    "HFSampler": "negtune.rollouts.hf",
    "MathVerifier": "negtune.verifiers.math",
    "PreferenceConfig": "negtune.trainers.preference",
    "PreferenceTrainer": "negtune.trainers.preference",
    "QueryEncoderConfig": "negtune.trainers.query_encoder",
    "QueryEncoderTrainer": "negtune.trainers.query_encoder",
    "RankingConfig": "negtune.trainers.ranking",
    "RankingLoss": "negtune.retrieval.losses",
    "RankingTrainer": "negtune.trainers.ranking",
    "ReasoningGymVerifier": "negtune.verifiers.reasoning",
    "RecordStore": "negtune.rollouts.store",
    "RefreshNegatives": "negtune.trainers.refresh",
    "Rollout": "negtune.rollouts.sampler",
    "SamplingParams": "negtune.rollouts.sampler",
    "SequenceLogps": "negtune.ops",
    "StepGRPOConfig": "negtune.trainers.grpo",
    "StepGRPOTrainer": "negtune.trainers.grpo",
    "UnlearningConfig": "negtune.trainers.unlearning",
    "UnlearningTrainer": "negtune.trainers.unlearning",
    "VLLMSampler": "negtune.rollouts.vllm",
    "VLLMServerSampler": "negtune.rollouts.server",
    "Verdict": "negtune.verifiers.verdict",
    "attest": "negtune.rollouts.attest",
}
__all__ = [
    "AdvantageConfig",
    "AdvantageTrainer",
    "CodeVerifier",
    "CoupledConfig",
    "CoupledTrainer",
    "ExactVerifier",
    "HFSampler",
    "MathVerifier",
    "PreferenceConfig",
    "PreferenceTrainer",
    "QueryEncoderConfig",
    "QueryEncoderTrainer",
    "RankingConfig",
    "RankingLoss",
    "RankingTrainer",
    "ReasoningGymVerifier",
    "RecordStore",
    "RefreshNegatives",
    "Rollout",
    "SamplingParams",
    "SequenceLogps",
    "StepGRPOConfig",
    "StepGRPOTrainer",
    "UnlearningConfig",
    "UnlearningTrainer",
    "VLLMSampler",
    "VLLMServerSampler",
    "Verdict",
    "__version__",
    "attest",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'negtune' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

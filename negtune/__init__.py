"""Fine-tune language models on what they should not say, do or retrieve.

Public names are loaded on first use, so that `import negtune` and the `negtune` command start without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from negtune.ops import SequenceLogps as SequenceLogps
    from negtune.trainers.preference import PreferenceConfig as PreferenceConfig
    from negtune.trainers.preference import PreferenceTrainer as PreferenceTrainer
    from negtune.trainers.unlearning import UnlearningConfig as UnlearningConfig
    from negtune.trainers.unlearning import UnlearningTrainer as UnlearningTrainer

__version__ = "0.1.0"

_HOMES = {
    "SequenceLogps": "negtune.ops",
    "PreferenceConfig": "negtune.trainers.preference",
    "PreferenceTrainer": "negtune.trainers.preference",
    "UnlearningConfig": "negtune.trainers.unlearning",
    "UnlearningTrainer": "negtune.trainers.unlearning",
}
__all__ = [
    "PreferenceConfig",
    "PreferenceTrainer",
    "SequenceLogps",
    "UnlearningConfig",
    "UnlearningTrainer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'negtune' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

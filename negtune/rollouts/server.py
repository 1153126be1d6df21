"""Sampling from a vLLM server over HTTP, for training with LoRA on one machine and drawing on another.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 python -m vllm.entrypoints.openai.api_server --model MODEL --dtype float32 \\
        --enable-lora --max-lora-rank 16 --logprobs-mode processed_logprobs

The server reads adapters from a folder that both machines see. Every version has a name of its own; a server that was
started again and knows nothing of it is given it again. Nothing is sent to any address but the one given: redirects and
proxies are not followed.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import nn

from negtune.models.policy import is_peft
from negtune.rollouts.adapters import lora_rank, refuse_unservable, save_adapter
from negtune.rollouts.attest import served_weights_hash
from negtune.rollouts.sampler import (
    Request,
    Rollout,
    Sampler,
    SamplingParams,
    fitting_token_ids,
    make_rollout,
)

ENGINE = "vllm server"


class ServerError(RuntimeError):
    """The server cannot be reached, or refuses; the message says what to do."""


class VLLMServerSampler(Sampler):
    """Draws from a vLLM server that serves the adapter of the last `update`.

    Args:
        model: a `PeftModel` with a LoRA adapter, whose base model the server has. Or the name of the server's model
            (folder or hub id), to draw from that as it is.
        tokenizer: of the model.
        url: `http://host:port` of the server.
        policy: version of the weights, for the record.
        folder: where adapters are put for the server to read, on a file system that both see; a temporary one if not
            given.
        api_key: sent as bearer token.
        concurrency: requests at a time.
        timeout: seconds for one request.
        patience: seconds of lost connections, timeouts and 5xx answers in a row, before a request is given up.

    Raises:
        ValueError: the model cannot be served, or the server has another model or too small a `max_lora_rank`.
        ServerError: it cannot be reached, or was started without adapters.
    """

    def __init__(
        self,
        model: nn.Module | str,
        tokenizer: Any,
        url: str,
        *,
        policy: str = "0",
        folder: str | Path | None = None,
        api_key: str | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        patience: float = 120.0,
    ) -> None:
        if not isinstance(model, str):
            _refuse_full(model)
            refuse_unservable(model)
        self._server = _Server(url, api_key, timeout, patience)
        self.tokenizer, self.policy = tokenizer, policy
        self.served_hash: str | None = None
        self._temporary = tempfile.TemporaryDirectory(prefix="negtune-adapters-") if folder is None else None
        self._folder = Path(folder or self._temporary.name)
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="negtune-server")
        self._session, self._version = uuid.uuid4().hex[:8], 0
        self._adapter: tuple[str, Path] | None = None
        self._base, self._longest = self._check_model(model)
        if not isinstance(model, str):
            self.update(model, policy)

    def update(self, model: nn.Module, policy: str) -> None:
        """Sample from the adapter that `model` has now, called `policy` from here on."""
        _refuse_full(model)
        self._version += 1
        name = f"policy-{self._session}-{self._version}"
        before, self._adapter = self._adapter, (name, save_adapter(model, self._folder / name).resolve())
        try:
            self._load_adapter()
        except ServerError as error:
            if "max_lora_rank" in str(error):
                raise ValueError(
                    f"the server's max_lora_rank is too small for this adapter; start it with --max-lora-rank "
                    f"{lora_rank(model)} ({error})"
                ) from error
            raise
        if before is not None:
            self._server.post("/v1/unload_lora_adapter", {"lora_name": before[0]}, accept=(404,))
            shutil.rmtree(self._folder / before[0])
        self.served_hash, self.policy = served_weights_hash(model), policy

    def draw(self, requests: Sequence[Request], params: SamplingParams) -> list[Rollout]:
        """See `Sampler.draw`. Raises ValueError, before anything is drawn, for a prompt that does not fit."""
        ids = fitting_token_ids(requests, self.tokenizer, self._longest)
        waiting = [self._threads.submit(self._draw_one, r, row, params) for r, row in zip(requests, ids, strict=True)]
        try:
            return [future.result() for future in waiting]
        except BaseException:
            for future in waiting:
                future.cancel()
            raise

    def close(self) -> None:
        """Take the adapter off the server, and forget its folder."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._adapter is not None:
            with suppress(OSError):  # it is gone, and the adapter with it
                self._server.once("POST", "/v1/unload_lora_adapter", {"lora_name": self._adapter[0]})
        if self._temporary is not None:
            self._temporary.cleanup()

    def _draw_one(self, request: Request, ids: list[int], params: SamplingParams) -> Rollout:
        body = {
            "model": self._base if self._adapter is None else self._adapter[0],
            "prompt": ids,
            "n": 1,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "max_tokens": min(params.max_tokens, self._longest - len(ids)),
            "stop": list(params.stop),
            "include_stop_str_in_output": True,
            "seed": request.seed(params),
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        answer = self._server.post("/v1/completions", body, accept=() if self._adapter is None else (404,))
        if answer is None:  # a server that was started again does not know the adapter
            self._load_adapter()
            answer = self._server.post("/v1/completions", body)
        choice = answer["choices"][0]
        if choice["prompt_token_ids"] != ids:
            raise ServerError("the server changed the prompt's tokens; it has another tokenizer")
        return make_rollout(
            request,
            params,
            self,
            ENGINE,
            prompt_ids=ids,
            completion_ids=choice["token_ids"],
            logps=choice["logprobs"]["token_logprobs"],
            reason=str(choice["finish_reason"]),
        )

    def _load_adapter(self) -> None:
        assert self._adapter is not None
        name, path = self._adapter
        body = {"lora_name": name, "lora_path": str(path)}
        try:
            self._server.post("/v1/load_lora_adapter", body)
        except ServerError as error:
            if "already been loaded" in str(error):  # by another thread, or by the request whose answer was lost
                return
            if error.args[1:] == (404,) and "No adapter found" not in str(error):
                raise ServerError(
                    "the server takes no adapters at run time; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and "
                    f"--enable-lora ({error})"
                ) from error
            if "No adapter found" in str(error):
                raise ServerError(
                    f"the server does not see {path}; give folder= on a file system that both machines share ({error})"
                ) from error
            raise

    def _check_model(self, model: Any) -> tuple[str, int]:
        """Name and `max_model_len` of the server's base model, which has to be the trained one's."""
        served = self._server.get("/v1/models")["data"]
        base = next((m for m in served if not m.get("parent")), None)
        if base is None:
            raise ServerError(f"the server lists no base model, only {[m['id'] for m in served]}")
        ours = model if isinstance(model, str) else str(model.get_base_model().config._name_or_path)
        if _model_name(base["root"]) != _model_name(ours) and _model_name(base["id"]) != _model_name(ours):
            wanted = f"{ours} is wanted" if isinstance(model, str) else f"the adapter belongs to {ours}"
            raise ValueError(f"the server serves {base['root']}, {wanted}; start it with --model {ours}")
        return base["id"], int(base["max_model_len"])


class _Server:
    """JSON over HTTP to one address, with retries."""

    def __init__(self, url: str, api_key: str | None, timeout: float, patience: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must be http://host:port, got {url!r}")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/").removesuffix("/v1")
        self.url, self._timeout, self._patience = url, timeout, patience
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )

    def get(self, path: str) -> Any:
        return self._ask("GET", path, None, ())

    def post(self, path: str, body: Mapping[str, Any], *, accept: Sequence[int] = ()) -> Any:
        """The answer, or None where its status is one of `accept`."""
        return self._ask("POST", path, body, accept)

    def once(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        """Status and content, without a second try."""
        connection = self._kind(self._host, self._port, timeout=self._timeout)
        try:
            connection.request(method, self._path + path, None if body is None else json.dumps(body), self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _ask(self, method: str, path: str, body: Any, accept: Sequence[int]) -> Any:
        wait, began = 0.25, time.monotonic()
        while True:
            try:
                status, content = self.once(method, path, body)
                failure = f"answers {status}: {content[:200].decode(errors='replace')}" if status >= 500 else None
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, ended in the middle
                status, content, failure = 0, b"", f"{type(error).__name__}: {error}"
            if failure is None or b"max_lora_rank" in content:  # which another try does not change
                return self._content(path, status, content, accept)
            if time.monotonic() - began + wait > self._patience:
                raise ServerError(f"{self.url}{path}: {failure}, for {self._patience:g} s; is the server running?")
            time.sleep(wait)
            wait = min(2 * wait, 10.0)

    def _content(self, path: str, status: int, content: bytes, accept: Sequence[int]) -> Any:
        if status in accept:
            return None
        if status != 200:
            raise ServerError(f"{self.url}{path}: {status} {content[:500].decode(errors='replace')}", status)
        try:
            return json.loads(content)
        except ValueError:
            return content.decode(errors="replace")


def _refuse_full(model: nn.Module) -> None:
    if not is_peft(model):
        raise ValueError("a server takes LoRA adapters only; train with peft_config, or sample with VLLMSampler")


def _model_name(text: str) -> str:
    """A folder by its real path, a hub id as it is."""
    return os.path.realpath(text) if os.path.isdir(text) else text.rstrip("/")

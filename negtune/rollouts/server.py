"""Sampling from a vLLM server over HTTP, for training with LoRA on one machine and drawing on another.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 python -m vllm.entrypoints.openai.api_server --model MODEL --dtype bfloat16 \\
        --enable-lora --max-lora-rank 16 --logprobs-mode processed_logprobs

The server reads adapters from a folder that both machines see. Every version has a name of its own; a server that was
started again and knows nothing of it is given it again. Nothing is sent to any address but the one given: redirects and
proxies are not followed.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import shutil
import socket
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
from negtune.models.structure import causal_lm, unwrapped
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

logger = logging.getLogger(__name__)

ENGINE = "vllm server"
SILENT_TRIES = 3
"""A request that has failed so often says that it waits."""


class ServerError(RuntimeError):
    """The server cannot be reached, or refuses; the message says what to do.

    Args:
        status: of the HTTP answer, 0 if there was none.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


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
        patience: seconds from a request's first lost connection, timeout or 5xx answer in a row, until it is given up;
            a server that is started again has to be ready within them.

    Raises:
        ValueError: the model cannot be served, or the server has another model, another `logprobs_mode` or too small
            a `max_lora_rank`.
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
        patience: float = 300.0,
    ) -> None:
        if isinstance(model, str):
            self._wanted = model
        else:
            _refuse_full(model)
            refuse_unservable(model)
            self._wanted = str(causal_lm(model).config._name_or_path)
        self._server = _Server(url, api_key, timeout, patience)
        self.tokenizer, self.policy = tokenizer, policy
        self.served_hash: str | None = None
        self._temporary = tempfile.TemporaryDirectory(prefix="negtune-adapters-") if folder is None else None
        self._folder = Path(folder or self._temporary.name)
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="negtune-server")
        self._session, self._version = uuid.uuid4().hex[:8], 0
        self._adapter: tuple[str, Path] | None = None
        generation = None if isinstance(model, str) else causal_lm(model).generation_config
        self._eos = eos_token_ids(tokenizer, generation)
        self._base, self._longest = self._check_model()
        self._check_logprobs_mode()
        if not isinstance(model, str):
            self.update(model, policy)

    def update(self, model: nn.Module, policy: str) -> None:
        """Sample from the adapter that `model` has now, called `policy` from here on."""
        _refuse_full(model)
        self._version += 1
        name = f"policy-{self._session}-{self._version}"
        adapter = (name, save_adapter(model, self._folder / name).resolve())
        try:
            self._load_adapter(adapter)
        except BaseException as error:
            shutil.rmtree(self._folder / name, ignore_errors=True)
            if "max_lora_rank" in str(error):
                raise ValueError(
                    f"the server's max_lora_rank is too small for this adapter; start it with --max-lora-rank "
                    f"{lora_rank(model)} ({error})"
                ) from error
            raise
        before, self._adapter = self._adapter, adapter
        self.served_hash, self.policy = served_weights_hash(model), policy
        self._forget(before)

    def draw(self, requests: Sequence[Request], params: SamplingParams) -> list[Rollout]:
        """See `Sampler.draw`. Raises ValueError, before anything is drawn, for a prompt that does not fit."""
        ids = fitting_token_ids(requests, self.tokenizer, self._longest)
        waiting = [self._threads.submit(self._draw_one, r, row, params) for r, row in zip(requests, ids, strict=True)]
        try:
            return [future.result() for future in waiting]
        except BaseException:
            for future in waiting:
                future.cancel()
            self._server.drop_requests()  # their threads would be waited for
            raise

    def close(self) -> None:
        """Take the adapter off the server, and delete its folder."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._forget(self._adapter)
        self._adapter = None
        if self._temporary is not None:
            self._temporary.cleanup()

    def _forget(self, adapter: tuple[str, Path] | None) -> None:
        """Unload an adapter and delete its files. What cannot be unloaded is gone with the server that had it."""
        if adapter is None:
            return
        with suppress(OSError, http.client.HTTPException):
            self._server.once("POST", "/v1/unload_lora_adapter", {"lora_name": adapter[0]})
        shutil.rmtree(self._folder / adapter[0], ignore_errors=True)

    def _draw_one(self, request: Request, ids: list[int], params: SamplingParams) -> Rollout:
        body = {
            "model": self._base if self._adapter is None else self._adapter[0],
            "prompt": ids,
            "n": 1,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "repetition_penalty": 1.0,  # the checkpoint's generation_config.json is taken for what is not said
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": self._eos,
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
            self._check_model()
            self._load_adapter(self._adapter)
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

    def _load_adapter(self, adapter: tuple[str, Path]) -> None:
        name, path = adapter
        try:
            self._server.post(
                "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}, refusal=500, text=True
            )
        except ServerError as error:
            text = str(error)
            if "already been loaded" in text:  # by another thread, or by the request whose answer was lost
                return
            if "No adapter found" in text:
                raise ServerError(
                    f"the server does not see {path}; give folder= on a file system that both machines share ({text})"
                ) from error
            if error.status == 404 or "LoRA is not enabled" in text:
                raise ServerError(
                    "the server takes no adapters at run time; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and "
                    f"--enable-lora ({text})"
                ) from error
            raise

    def _check_model(self) -> tuple[str, int]:
        """Name and `max_model_len` of the server's base model, which has to be the wanted one."""
        served = self._server.get("/v1/models")["data"]
        base = next((m for m in served if not m.get("parent")), None)
        if base is None:
            raise ServerError(f"the server lists no base model, only {[m['id'] for m in served]}")
        if _model_name(self._wanted) not in (_model_name(base["root"]), _model_name(base["id"])):
            raise ValueError(
                f"the server serves {base['root']}, {self._wanted} is wanted; start it with --model {self._wanted}"
            )
        return base["id"], int(base["max_model_len"])

    def _check_logprobs_mode(self) -> None:
        """The only token that `top_k=1` leaves has log-probability 0 in the distribution that is drawn from."""
        ids = self.tokenizer("The answer is")["input_ids"]
        body = {"model": self._base, "prompt": ids, "max_tokens": 1, "top_k": 1, "temperature": 1.0, "logprobs": 0}
        logp = self._server.post("/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"][0]
        if logp != 0:
            raise ValueError(
                "the server's log-probabilities are not of the distribution that tokens are drawn from; start it with "
                "--logprobs-mode processed_logprobs"
            )


class _Server:
    """JSON over HTTP to one address, with retries."""

    def __init__(self, url: str, api_key: str | None, timeout: float, patience: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must be http://host:port, got {url!r}")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/").removesuffix("/v1")
        self.url, self._timeout, self._patience = url, timeout, patience
        self._open: set[Any] = set()
        self._dropped = 0
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )

    def get(self, path: str) -> Any:
        return self._ask("GET", path, None)

    def post(
        self, path: str, body: Mapping[str, Any], *, accept: Sequence[int] = (), refusal: int = 0, text: bool = False
    ) -> Any:
        """The answer, or None where its status is one of `accept`. Another try does not change a `refusal`. Without
        `text` an answer is JSON: a line that ends within the head leaves an empty one of status 200.
        """
        return self._ask("POST", path, body, accept, refusal, text=text)

    def once(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        """Status and content, without a second try."""
        connection = self._kind(self._host, self._port, timeout=self._timeout)
        self._open.add(connection)
        try:
            connection.request(method, self._path + path, None if body is None else json.dumps(body), self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            self._open.discard(connection)
            connection.close()

    def drop_requests(self) -> None:
        """End what is under way at once, without further tries."""
        self._dropped += 1
        for connection in list(self._open):
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _ask(
        self, method: str, path: str, body: Any, accept: Sequence[int] = (), refusal: int = 0, *, text: bool = False
    ) -> Any:
        wait, tries, failing_since, dropped = 0.25, 0, None, self._dropped
        while True:
            tries += 1
            try:
                status, content = self.once(method, path, body)
                retry = status >= 500 and status != refusal
                failure = f"answers {status}: {content[:200].decode(errors='replace')}" if retry else None
                if status == 200 and not text and not _is_json(content):
                    failure = f"the answer is no JSON: {content[:200]!r}"
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, ended in the middle
                status, content, failure = 0, b"", f"{type(error).__name__}: {error}"
            if failure is None:
                return self._content(path, status, content, accept)
            now = time.monotonic()
            failing_since = now if failing_since is None else failing_since
            if now - failing_since + wait > self._patience or self._dropped != dropped:
                raise ServerError(
                    f"{self.url}{path}: {failure}, for {now - failing_since:.0f} s; is the server running?", status
                )
            if tries == SILENT_TRIES:
                logger.warning("%s%s: %s; tried again for %g s", self.url, path, failure, self._patience)
            time.sleep(wait)
            wait = min(2 * wait, 10.0)

    def _content(self, path: str, status: int, content: bytes, accept: Sequence[int]) -> Any:
        if status in accept:
            return None
        if status != 200:
            raise ServerError(f"{self.url}{path}: {status} {content[:500].decode(errors='replace')}", status)
        return json.loads(content) if _is_json(content) else content.decode(errors="replace")


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def _refuse_full(model: nn.Module) -> None:
    if not is_peft(unwrapped(model)):
        raise ValueError("a server takes LoRA adapters only; train with peft_config, or sample with VLLMSampler")


def _model_name(text: str) -> str:
    """A folder by its real path, a hub id as it is."""
    return os.path.realpath(text) if os.path.isdir(text) else text.rstrip("/")

"""VLLMServerSampler against a real server process on loopback, and what it does when server or network fail."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from negtune.cli.main import main
from negtune.metrics.judgement import VERDICTS
from negtune.models.load import load_model
from negtune.models.tiny import save_tiny, tiny_lm
from negtune.records import write_jsonl
from negtune.rollouts.attest import StaleEngineError, attest
from negtune.rollouts.hf import HFSampler
from negtune.rollouts.relevance import SamplerJudge
from negtune.rollouts.sampler import SamplingParams
from negtune.rollouts.server import ServerError, VLLMServerSampler, _Server
from negtune.rollouts.store import RecordStore

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vLLM: pip install 'negtune[vllm]', or make test"
)
PROMPTS = ["Where is Rome?", "Who", [{"role": "user", "content": "Hi"}]]
PARAMS = SamplingParams(max_tokens=8)
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


class Server:
    """A vLLM server process that can be killed and started again on the same port."""

    def __init__(self, folder: Path, log: Path, logprobs_mode: str = "processed_logprobs") -> None:
        self.logprobs_mode = logprobs_mode
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.log, self.url = folder, log, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        command += ["--max-model-len", "384", "--enable-lora", "--max-lora-rank", "8"]
        command += ["--logprobs-mode", self.logprobs_mode, "--no-enable-chunked-prefill"]
        command += ["--override-generation-config", '{"repetition_penalty": 1.9}']  # as some checkpoints have it
        environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_CI_ENV": "1"}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def wait(self, seconds: float = 240) -> None:
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def server(tiny_folder, tmp_path_factory):
    one = Server(tiny_folder, tmp_path_factory.mktemp("server") / "log")
    one.start()
    one.wait()
    yield one
    one.kill()


@pytest.fixture
def model_and_tokenizer(tiny_folder):
    model, tokenizer = load_model(tiny_folder)
    return get_peft_model(model, LoraConfig(**LORA)), tokenizer


class Wire:
    """A line to the server on which faults happen: `faults` are used up one per connection, then all goes through."""

    def __init__(self, port: int, faults: list[str]) -> None:
        self._target, self._faults = port, faults
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            fault = self._faults.pop(0) if self._faults else ""
            threading.Thread(target=self._serve, args=(client, fault), daemon=True).start()

    def _serve(self, client: socket.socket, fault: str) -> None:
        if fault == "reset":
            client.recv(10)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            return
        if fault == "silent":
            client.settimeout(600)
            while client.recv(1 << 16):  # head and body may come apart; then nothing, until the other side gives up
                pass
            client.close()
            return
        if fault == "slow":
            time.sleep(3)
            client.close()
            return
        if fault == "half a head":
            client.recv(1 << 16)
            client.sendall(b"HTTP/1.1 200 OK\r\nserver: uv")
            client.shutdown(socket.SHUT_WR)
            while client.recv(1 << 16):
                pass
            client.close()
            return
        if fault in ("503", "redirect"):
            client.recv(1 << 16)
            head = b"503 Busy\r\n" if fault == "503" else b"307 Elsewhere\r\nLocation: http://127.0.0.2:9/\r\n"
            client.sendall(b"HTTP/1.1 " + head + b"Content-Length: 0\r\n\r\n")
            client.close()
            return
        target = socket.create_connection(("127.0.0.1", self._target))
        threading.Thread(target=_copy, args=(client, target, 1 << 30), daemon=True).start()
        _copy(target, client, 60 if fault == "cut" else 1 << 30)  # in the middle of the answer
        client.close()
        target.close()

    def close(self) -> None:
        self._listener.close()


def _copy(source: socket.socket, sink: socket.socket, most: int) -> None:
    while most > 0:
        try:
            data = source.recv(min(most, 1 << 16))
            if not data:
                break
            sink.sendall(data)
        except OSError:
            break
        most -= len(data)


@needs_vllm
def test_every_version_is_served_exactly(server, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    sampler = VLLMServerSampler(model, tokenizer, server.url)
    for version in ("1", "2"):
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
        with pytest.raises(StaleEngineError, match="the engine is stale"):
            attest(sampler, model, tokenizer)
        sampler.update(model, version)
        assert attest(sampler, model, tokenizer, temperature=0.7).max_difference < 1e-4
    rollouts = sampler.sample(PROMPTS, n=3, params=PARAMS)
    assert [r.number for r in rollouts] == [0, 1, 2] * 3
    assert {r.policy for r in rollouts} == {"2"}
    with urllib.request.urlopen(f"{server.url}/v1/models") as answer:
        adapters = [m["id"] for m in json.load(answer)["data"] if m.get("parent")]
    assert adapters == [sampler._adapter[0]]  # older versions are gone
    sampler.close()


@needs_vllm
def test_the_servers_own_model_is_drawn_from_without_loading_it(server, tiny_folder, tmp_path, capsys):
    model, tokenizer = load_model(tiny_folder)
    sampler = VLLMServerSampler(str(tiny_folder), tokenizer, server.url)
    assert attest(sampler, model, tokenizer).max_difference < 1e-4
    with pytest.raises(ValueError, match="a server takes LoRA adapters only"):
        sampler.update(model, "1")
    sampler.close()
    with pytest.raises(ValueError, match="some/model is wanted; start it with --model some/model"):
        VLLMServerSampler("some/model", tokenizer, server.url)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Who?"}, {"prompt": "Where?"}])
    generate = ["rollouts", "generate", "--model", str(tiny_folder), "--prompts", str(tmp_path / "prompts.jsonl")]
    generate += ["--store", str(tmp_path / "store"), "--max_tokens", "4", "--engine", "server", "--url", server.url]
    assert main(generate) == 0
    assert "2 drawn, 2 in" in capsys.readouterr().out
    get_peft_model(model, LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    assert main([*generate, "--adapter", str(tmp_path / "adapter")]) == 0
    assert "2 drawn, 4 in" in capsys.readouterr().out  # another policy
    assert {r["engine"] for r in RecordStore(tmp_path / "store")} == {"vllm server"}


@needs_vllm
@pytest.mark.parametrize("faults", [["reset"] * 3, ["slow"] * 2, ["503"] * 3, ["cut"] * 3, ["half a head"] * 3])
def test_a_fault_on_the_line_costs_a_retry_and_no_rollout(server, model_and_tokenizer, faults):
    model, tokenizer = model_and_tokenizer
    undisturbed = VLLMServerSampler(model, tokenizer, server.url)
    expected = [r.completion_ids for r in undisturbed.sample(PROMPTS, n=2, params=PARAMS)]
    undisturbed.close()
    wire = Wire(server.port, [])
    sampler = VLLMServerSampler(model, tokenizer, wire.url, timeout=2, patience=60)
    wire._faults += faults
    assert [r.completion_ids for r in sampler.sample(PROMPTS, n=2, params=PARAMS)] == expected
    assert wire._faults == []
    sampler.close()
    wire.close()


@needs_vllm
def test_a_server_that_does_not_fit_is_refused_with_the_way_out(server, tiny_folder, tmp_path):
    model, tokenizer = load_model(tiny_folder)
    large = get_peft_model(model, LoraConfig(**{**LORA, "r": 16}))
    start = time.monotonic()
    with pytest.raises(ValueError, match="start it with --max-lora-rank 16"):
        VLLMServerSampler(large, tokenizer, server.url)
    assert time.monotonic() - start < 60  # no retries of what cannot change
    save_tiny(tmp_path / "other", seed=1)
    other = get_peft_model(load_model(tmp_path / "other")[0], LoraConfig(**LORA))
    with pytest.raises(ValueError, match="start it with --model"):
        VLLMServerSampler(other, tokenizer, server.url)


@needs_vllm
@pytest.mark.slow
def test_a_server_whose_log_probabilities_are_of_another_distribution_is_refused(tiny_folder, tmp_path):
    raw = Server(tiny_folder, tmp_path / "log", logprobs_mode="raw_logprobs")
    raw.start()
    try:
        raw.wait()
        with pytest.raises(ValueError, match="start it with --logprobs-mode processed_logprobs"):
            VLLMServerSampler(str(tiny_folder), load_model(tiny_folder)[1], raw.url)
    finally:
        raw.kill()


@needs_vllm
@pytest.mark.slow
def test_a_judge_on_a_server_says_what_it_says_in_this_process(server, tiny_folder):
    model, tokenizer = load_model(tiny_folder)
    settings = {
        "model": "tiny",
        "prompt": lambda query, document, **_: f"{query} {document}",
        "parse": lambda text: VERDICTS[len(text) % 3],
        "params": SamplingParams(temperature=0.0, max_tokens=5, stop=("a", "e", "t")),
    }
    here = SamplerJudge(HFSampler(model, tokenizer), **settings)
    there = SamplerJudge(VLLMServerSampler(str(tiny_folder), tokenizer, server.url), **settings)
    queries, documents = ["Who", "Where is"] * 8, [f"Rome {i}" for i in range(16)]
    said = here(queries, documents)
    assert there(queries, documents) == said
    assert set(said) == {*VERDICTS, None}
    assert (there.asked, there.cut, there.errors, there.unread) == (here.asked, here.cut, 0, 0)
    assert there.name == here.name
    there.sampler.close()


@needs_vllm
def test_an_update_that_fails_changes_nothing(server, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    wire = Wire(server.port, [])
    sampler = VLLMServerSampler(model, tokenizer, wire.url, policy="good", patience=0.3)
    before, folders = sampler.sample(PROMPTS, params=PARAMS), set(sampler._folder.iterdir())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    wire._faults += ["503"] * 3
    with pytest.raises(ServerError, match="is the server running"):
        sampler.update(model, "bad")
    wire._faults.clear()
    assert sampler.sample(PROMPTS, params=PARAMS) == before
    assert set(sampler._folder.iterdir()) == folders
    sampler.update(model, "better")
    attest(sampler, model, tokenizer)
    folder = sampler._folder
    sampler.close()
    assert not folder.exists()
    wire.close()


@needs_vllm
def test_what_the_server_refuses_for_good_is_said_at_once_and_in_its_words(server, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    sampler = VLLMServerSampler(model, tokenizer, server.url)
    start = time.monotonic()
    with pytest.raises(ServerError, match="does not see /nowhere"):
        sampler._load_adapter(("name", Path("/nowhere")))
    assert time.monotonic() - start < 30  # of 300 s of patience
    sampler.close()


@needs_vllm
def test_requests_under_way_end_when_the_draw_does(server, model_and_tokenizer, monkeypatch):
    """As at Ctrl-C: threads that wait for a silent server would keep the process for `timeout` seconds."""
    model, tokenizer = model_and_tokenizer
    wire = Wire(server.port, [])
    sampler = VLLMServerSampler(model, tokenizer, wire.url, timeout=600)
    wire._faults += ["silent"] * 3
    failed: list[Exception] = []

    def draw() -> None:
        try:
            sampler.sample(PROMPTS, params=PARAMS)
        except ServerError as error:
            failed.append(error)

    drawing = threading.Thread(target=draw)
    drawing.start()
    while wire._faults:
        time.sleep(0.05)
    time.sleep(0.5)
    sampler._server.drop_requests()
    drawing.join(30)
    assert not drawing.is_alive()
    assert failed
    wire._faults.clear()
    assert len(sampler.sample(PROMPTS, params=PARAMS)) == 3  # later draws are served
    sampler.close()
    wire.close()


def test_patience_begins_with_the_first_failure_not_with_the_request(tmp_path):
    """A request that took longer than `patience` before its connection broke is still tried again."""
    replies = iter(["slow", "ok"])

    class Wanted(_Server):
        def once(self, method, path, body):
            if next(replies) == "slow":
                time.sleep(0.6)
                raise ConnectionResetError("in the middle")
            return 200, b"{}"

    assert Wanted("http://127.0.0.1:1", None, 1.0, 0.5).get("/v1/models") == {}


@needs_vllm
@pytest.mark.slow
def test_a_server_killed_in_mid_batch_and_started_again_loses_and_doubles_nothing(server, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    params = SamplingParams(max_tokens=64)
    sampler = VLLMServerSampler(model, tokenizer, server.url, concurrency=4, patience=300)
    prompts = [f"Question {i}?" for i in range(40)]
    expected = [r.completion_ids for r in sampler.sample(prompts, params=params)]
    found: list = []
    drawing = threading.Thread(target=lambda: found.extend(sampler.sample(prompts, params=params)))
    drawing.start()
    time.sleep(0.5)
    server.kill()
    assert drawing.is_alive()
    server.start()  # without the adapter
    server.wait()
    drawing.join(300)
    assert len({r.key for r in found}) == len(prompts)
    same = sum(r.completion_ids == ids for r, ids in zip(found, expected, strict=True))
    assert same >= 0.9 * len(prompts)  # batches are others, and with them the last bits of the logits
    attest(sampler, model, tokenizer)
    sampler.close()


def test_a_server_that_is_not_there_is_named(tiny, caplog):
    model = get_peft_model(tiny[0], LoraConfig(**LORA))
    with pytest.raises(ServerError, match=r"127.0.0.1:1/v1/models: ConnectionRefusedError.* is the server running"):
        VLLMServerSampler(model, tiny[1], "http://127.0.0.1:1", patience=0.5)
    assert not caplog.records
    with pytest.raises(ServerError, match="is the server running"):
        VLLMServerSampler(model, tiny[1], "http://127.0.0.1:1", patience=2)  # tries at 0, .25, .75 and 1.75 s
    (said,) = caplog.messages
    assert "http://127.0.0.1:1/v1/models: ConnectionRefusedError" in said
    assert "tried again for 2 s" in said
    with pytest.raises(ValueError, match="url must be http"):
        VLLMServerSampler(model, tiny[1], "localhost:8000")
    with pytest.raises(ValueError, match="LoRA adapters only"):
        VLLMServerSampler(tiny_lm(), tiny[1], "http://127.0.0.1:1")


def test_an_answer_that_ended_in_its_head_is_no_answer(tiny):
    wire = Wire(1, ["half a head"] * 20)
    model = get_peft_model(tiny[0], LoraConfig(**LORA))
    with pytest.raises(ServerError, match="the answer is no JSON: b'', for"):
        VLLMServerSampler(model, tiny[1], wire.url, patience=0.5)
    assert len(wire._faults) < 19  # asked for again
    wire.close()


def test_redirects_and_proxies_are_not_followed(tiny, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.2:9")
    wire = Wire(1, ["redirect"])
    model = get_peft_model(tiny[0], LoraConfig(**LORA))
    with pytest.raises(ServerError, match="307"):
        VLLMServerSampler(model, tiny[1], wire.url, patience=0.5)
    wire.close()

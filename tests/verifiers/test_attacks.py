"""Hostile solutions: none passes the tests without computing the sum, none leaves the sandbox.

Each file in `attacks/` defines `solve(a, b)` that is wrong unless its trick worked. What a host has that no solution
may reach is written into it: a file, a folder that anybody may write to, a port, a process.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import threading
from pathlib import Path

import psutil
import pytest

from negtune.verifiers.code import CodeVerifier
from negtune.verifiers.sandbox.launch import LEVELS, SandboxError, strongest_level
from negtune.verifiers.verdict import Verdict

ATTACKS = sorted((Path(__file__).parent / "attacks").glob("*.py"))
SECRET = "canary-secret"
HONEST = "def solve(a, b):\n    return a + b\n"
TESTS = """
import unittest

def check(candidate):
    assert candidate(2, 3) == 5
    assert candidate(-10, 4) == -6
    assert candidate(1000, 1) == 1001

class Cases(unittest.TestCase):
    def test_more(self):
        self.assertEqual(solve(7, 8), 15)
        self.assertTrue(solve(0, 0) == 0)
"""


@pytest.fixture(scope="session", params=[level for level in LEVELS if level != "rlimits"])
def sandboxed(request):
    """A verifier at each level that this machine offers."""
    if request.param == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bwrap is not installed (Debian: apt-get install bubblewrap)")
    try:
        verifier = CodeVerifier(seconds=1, workers=8, sandbox=request.param)
    except (ValueError, SandboxError) as error:
        pytest.skip(f"{request.param} does not work here: {error}")
    with verifier:
        assert verifier.level == request.param
        yield verifier


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """What must stay out of reach; yields the replacements for the attacks' placeholders."""
    folder = Path("/var/tmp") / f"negtune-canary-{os.getpid()}"  # every folder on the way is open to everybody
    (folder / "writable").mkdir(parents=True)
    (folder / "secret").write_text(SECRET)
    for path, mode in ((folder, 0o755), (folder / "secret", 0o644), (folder / "writable", 0o777)):
        path.chmod(mode)
    server = socket.create_server(("127.0.0.1", 0))
    connections: list[str] = []

    def answer() -> None:
        while True:
            try:
                connection, address = server.accept()
            except OSError:
                return
            connections.append(str(address))
            connection.sendall(SECRET.encode())
            connection.close()

    threading.Thread(target=answer, daemon=True).start()
    os.environ["NEGTUNE_CANARY"] = SECRET
    yield {
        "@CANARY_FILE@": str(folder / "secret"),
        "@CANARY_DIR@": str(folder / "writable"),
        "@CANARY_PORT@": str(server.getsockname()[1]),
        "@HOST_PID@": str(os.getpid()),
    }
    del os.environ["NEGTUNE_CANARY"]
    server.close()
    shutil.rmtree(folder)
    assert len(connections) <= 2  # our own, one per level


def submit(verifier: CodeVerifier, codes: list[str], host: dict[str, str]) -> list[Verdict]:
    for placeholder, value in host.items():
        codes = [code.replace(placeholder, value) for code in codes]
    return verifier.verify(["p"] * len(codes), codes, tests=[TESTS] * len(codes), entry_point=["solve"] * len(codes))


@pytest.fixture(scope="session")
def verdicts(sandboxed, host):
    """Of every attack, and of honest code that was judged right behind it."""
    codes = [code for path in ATTACKS for code in (path.read_text(encoding="utf-8"), HONEST)]
    found = submit(sandboxed, codes, host)
    return {path.stem: (found[2 * i], found[2 * i + 1]) for i, path in enumerate(ATTACKS)}


def test_the_honest_solution_passes_and_the_targets_are_real(sandboxed, host):
    (found,) = submit(sandboxed, [HONEST], host)
    assert (found.outcome, found.reason) == ("correct", "")
    assert Path(host["@CANARY_FILE@"]).read_text() == SECRET
    assert stat.S_IMODE(Path(host["@CANARY_DIR@"]).stat().st_mode) == 0o777
    with socket.create_connection(("127.0.0.1", int(host["@CANARY_PORT@"]))) as connection:
        assert connection.recv(100).decode() == SECRET


def test_there_are_attacks():
    assert len(ATTACKS) >= 40


@pytest.mark.parametrize("name", [path.stem for path in ATTACKS])
def test_attack(verdicts, host, name):
    attack, honest = verdicts[name]
    assert attack.outcome == "wrong", attack
    assert (honest.outcome, honest.reason) == ("correct", "")
    assert os.listdir(host["@CANARY_DIR@"]) == []


@pytest.mark.parametrize("what", ["note", "server"])
def test_nothing_is_left_for_the_next_job_of_the_same_sandbox(sandboxed, host, what):
    texts = [Path(__file__).parent.joinpath("attacks", f"{verb}_a_{what}.py").read_text() for verb in ("leave", "find")]
    with CodeVerifier(seconds=1, workers=1, sandbox=sandboxed.level) as one:
        assert [v.outcome for v in submit(one, texts * 2, host)] == ["wrong"] * 4


def test_no_process_outlives_its_job(sandboxed):
    """Threads and forks that go on for ever: after the verdict the sandbox has no more processes than before."""
    hanging = "import os, threading, time\ndef spin():\n    while True: time.sleep(0.01)\n"
    hanging += "threading.Thread(target=spin, daemon=False).start()\ntry:\n    os.fork()\nexcept OSError:\n    pass\n"
    with CodeVerifier(seconds=1, workers=1, sandbox=sandboxed.level) as one:
        one.verify(["p"], [HONEST], tests=["assert solve(1, 2) == 3"])
        parent = psutil.Process(one._all[0]._process.pid)
        before = len(parent.children(recursive=True))
        found = one.verify(["p"], [hanging + HONEST], tests=["assert solve(1, 2) == 3"])[0]
        assert found.outcome == "correct"
        assert len(parent.children(recursive=True)) == before


def test_the_level_in_force_is_known():
    level, why = strongest_level()
    assert level in LEVELS
    assert why or level == LEVELS[0]

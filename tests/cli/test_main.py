"""The command line: it starts fast, and a mistake costs one line, not a traceback."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import negtune
from negtune.cli import report
from negtune.cli.main import explain, main, nearest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "sentence_transformers", "numpy", "trl", "datasets", "matplotlib", "rich"}


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`, whatever it prints."""
    tail = "\nimport sys; print('\\n' + ' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + tail], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_starts_without_any_heavy_import():
    suppressed = "import contextlib\nwith contextlib.suppress(SystemExit):\n    main(['--help'])"
    modules = loaded_by(f"from negtune.cli.main import main\n{suppressed}")
    assert "negtune" in modules
    assert not modules & HEAVY


def test_import_negtune_is_light_and_a_name_loads_on_first_use():
    assert not loaded_by("import negtune; dir(negtune)") & HEAVY
    assert "torch" in loaded_by("from negtune import SequenceLogps")


def test_public_names_are_listed_and_resolve():
    assert {"SequenceLogps", "UnlearningConfig", "UnlearningTrainer", "__version__"} <= set(dir(negtune))
    assert set(negtune._HOMES) < set(negtune.__all__)
    installed = importlib.util.find_spec("sentence_transformers") is not None
    retrieval = {"RankingConfig", "RankingLoss", "RankingTrainer"}
    assert retrieval < set(negtune.__all__)
    for name in set(negtune.__all__) - (set() if installed else retrieval):
        assert getattr(negtune, name) is not None
    from negtune.ops import SequenceLogps

    assert negtune.SequenceLogps is SequenceLogps
    with pytest.raises(AttributeError, match="no attribute 'UnlearningTainer'"):
        _ = negtune.UnlearningTainer


def test_version_is_the_one_in_pyproject(capsys):
    code, out, _ = run(capsys, "--version")
    assert (code, out) == (0, f"negtune {negtune.__version__}\n")
    assert f'version = "{negtune.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["raport", "x"], "unknown choice 'raport'; did you mean report?"),
        (["zzz"], "choose from demo, eval, report, export, doctor"),
        (["report", "x", "--redcat"], "unknown argument --redcat; did you mean --redact? (negtune report --help)"),
        (["report", "x", "--ouput=y"], "did you mean --output?"),
        (["report", "x", "--red"], "did you mean --redact?"),  # no silent abbreviation
        (["report"], "required: RUN_DIR"),
        (["eval", "unlerning", "--model", "x"], "did you mean unlearning?"),
        (["eval", "unlearning", "--modle", "x"], "required: --model"),
        (["export", "a", "b", "c"], "unknown argument c"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_the_nearest_word(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("negtune: error: ")
    assert words in err
    assert err.count("\n") == 1


def test_no_arguments_print_the_help(capsys):
    code, out, _ = run(capsys)
    assert code == 2
    assert "doctor" in out


def test_a_users_mistake_is_one_line_and_debug_shows_the_traceback(capsys, tmp_path):
    code, out, err = run(capsys, "report", str(tmp_path / "nowhere"))
    assert (code, out) == (1, "")
    assert err == f"negtune: error: {tmp_path / 'nowhere'} is not a folder; give the output_dir of a run\n"
    with pytest.raises(FileNotFoundError):
        main(["report", str(tmp_path / "nowhere"), "--debug"])


def test_a_broken_file_is_named_with_its_line(capsys, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "history.jsonl").write_text('{"step": 1}\nnonsense\n')
    code, _, err = run(capsys, "report", str(tmp_path))
    assert code == 1
    assert f"{tmp_path / 'history.jsonl'}, line 2" in err
    assert err.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(report, "run", lambda args: {}["missing"])
    with pytest.raises(KeyError):
        main(["report", "x"])


def test_ctrl_c_is_one_line_and_130(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "run", interrupted)
    assert run(capsys, "report", "x") == (130, "", "negtune: interrupted\n")


def test_a_closed_pipe_ends_quietly():
    command = f"{sys.executable} -m negtune.cli.main report --help | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    assert explain(ModuleNotFoundError(name="matplotlib")) == (
        "matplotlib is not installed; run: pip install 'negtune[report]'"
    )
    assert explain(ModuleNotFoundError(name="foo.bar")) == "foo is not installed; run: pip install foo"


def test_nearest_is_silent_when_nothing_is_close():
    assert nearest("--zzz", ["--output", "--redact"]) == ""


def test_report_prints_what_it_wrote(capsys, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    code, out, _ = run(capsys, "report", str(tmp_path), "--output", str(tmp_path / "other"))
    assert code == 0
    assert [Path(line).name for line in out.split()] == ["report.md", "report.html"]
    assert all(Path(line).is_file() for line in out.split())


def test_a_torn_history_warns_in_one_line(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"st')
    command = [sys.executable, "-m", "negtune.cli.main", "report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.startswith(f"negtune: warning: {tmp_path / 'history.jsonl'}, line 2")
    assert done.stderr.count("\n") == 1

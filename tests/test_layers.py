"""House rules that a machine can check: layers of imports, length of files, forbidden calls, random state."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "ppomax"
SOURCES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
# The lazy API and `python -m ppomax` stand above all layers.
EXEMPT = {"__init__.py", "__main__.py"}
MAX_LINES = 399

# From the top down: each may import itself and what comes after it, and everything of BOTTOM.
ORDER = ("cli", "stages", "rollout", "rewards", "models", "data", "engine", "monitor")
BOTTOM = {
    "rl": {"rl", "types", "errors"},
    "config": {"config", "types", "errors"},
    "types": {"types", "errors"},
    "errors": {"errors"},
}
MAY_IMPORT = {layer: {*ORDER[i:], *BOTTOM} for i, layer in enumerate(ORDER)} | BOTTOM
RL_PACKAGES = {"torch", "jaxtyping", "ppomax", *sys.stdlib_module_names}

PICKLES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN = {
    "torch.load": "unpickles; read safetensors",
    "torch.save": "pickles; write safetensors",
    "torch.manual_seed": "moves the caller's random state; pass a Generator",
    "torch.random.manual_seed": "moves the caller's random state; pass a Generator",
    "torch.seed": "moves the caller's random state; pass a Generator",
    "torch.cuda.manual_seed": "moves the caller's random state; pass a Generator",
    "torch.cuda.manual_seed_all": "moves the caller's random state; pass a Generator",
    "numpy.random.seed": "moves the caller's random state; pass a Generator",
    "random.seed": "moves the caller's random state; pass a Random",
    "transformers.set_seed": "moves the caller's random state",
}
MUST_NOT_BE_TRUE = {"trust_remote_code", "allow_pickle"}
# transformers and PEFT draw fresh weights from the global generator: these files may seed it, inside fork_rng.
MAY_SEED_IN_FORK = {"models/embedded.py", "models/lora.py"}


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that the file at `path` (relative to src/ppomax) imports."""
    package = ("ppomax", *path.parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            base = [*package[: len(package) - node.level + 1], *module] if node.level else module
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


def layer_offences(path: Path, source: str) -> list[str]:
    """Imports that go up, or that the pure maths of rl/ must not have."""
    layer = path.with_suffix("").parts[0]
    if layer not in MAY_IMPORT:
        return [f"{path}: unknown layer {layer!r}; give it a place in the order of tests/test_layers.py"]
    offences = []
    for line, name in imports(path, ast.parse(source)):
        parts = name.split(".")
        if layer == "rl" and parts[0] not in RL_PACKAGES:
            offences.append(f"{path}:{line}: rl imports {parts[0]}; it may use torch and jaxtyping only")
        if parts[0] != "ppomax" or name == "ppomax.__version__":
            continue
        target = parts[1] if len(parts) > 1 else ""
        if target not in MAY_IMPORT:
            offences.append(f"{path}:{line}: imports {name} through the package's front door; import its module")
        elif target not in MAY_IMPORT[layer]:
            offences.append(f"{path}:{line}: {layer} imports {target}, which is above it")
    return offences


def call_offences(path: Path, source: str) -> list[str]:
    """Names that unpickle or move global random state, and arguments that run foreign code."""
    tree = ast.parse(source)
    names = _names(path, tree)
    forked = {
        id(child)
        for node in ast.walk(tree)
        if path.as_posix() in MAY_SEED_IN_FORK and isinstance(node, ast.With)
        and any(_full_name(getattr(item.context_expr, "func", item), names) == "torch.random.fork_rng"
                for item in node.items)
        for child in ast.walk(node)
    }  # fmt: skip
    offences = [
        f"{path}:{line}: imports {name.split('.')[0]}, which unpickles"
        for line, name in imports(path, tree)
        if name.split(".")[0] in PICKLES
    ]
    for node in ast.walk(tree):
        name = _full_name(node, names)
        if name in FORBIDDEN and not (name == "torch.manual_seed" and id(node) in forked):
            offences.append(f"{path}:{node.lineno}: {name} {FORBIDDEN[name]}")
        for argument in sorted(_set_true(node) & MUST_NOT_BE_TRUE):
            offences.append(f"{path}:{node.lineno}: {argument}=True runs code that came with the data")
    return offences


def length_offences(path: Path, source: str) -> list[str]:
    """Files of 400 lines and more."""
    lines = len(source.splitlines())
    return [f"{path}: {lines} lines; split it below {MAX_LINES + 1}"] if lines > MAX_LINES else []


def moved_random_states(statement: str) -> set[str]:
    """Names of the global generators that `statement`, in a fresh interpreter, leaves in another state."""
    program = f"""
import random, numpy, torch
def states():
    return {{"random": random.getstate(), "numpy": str(numpy.random.get_state()[1].tolist()),
            "torch": torch.get_rng_state().tolist()}}
before = states()
{statement}
after = states()
print(*[name for name in after if after[name] != before[name]])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def _names(path: Path, tree: ast.AST) -> dict[str, str]:
    """What each imported name of a file stands for: `np` → `numpy`, `seed` → `random.seed`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _full_name(node: ast.AST, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _full_name(node.value, names)
        return f"{owner}.{node.attr}" if owner else None
    return None


def _set_true(node: ast.AST) -> set[str | None]:
    """Names that this node sets to True: an argument, a dictionary's key, a default or an assignment."""
    if isinstance(node, ast.keyword):
        pairs: list[tuple[str | None, ast.AST | None]] = [(node.arg, node.value)]
    elif isinstance(node, ast.Dict):
        pairs = [(getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True)]
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        positional = [*node.args.posonlyargs, *node.args.args]
        with_default = positional[len(positional) - len(node.args.defaults) :]
        pairs = [(a.arg, d) for a, d in zip(with_default, node.args.defaults, strict=True)]
        pairs += [(a.arg, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        pairs = [(getattr(t, "id", getattr(t, "attr", None)), node.value) for t in targets]
    else:
        return set()
    return {name for name, value in pairs if isinstance(value, ast.Constant) and value.value is True}


RULES = [layer_offences, call_offences, length_offences]


def test_the_sources_are_found() -> None:
    assert len(SOURCES) > 40
    assert {path.parts[0] for path in SOURCES} >= {"stages", "rl", "types.py", "config"}


@pytest.mark.parametrize("rule", RULES)
def test_sources_keep_the_rule(rule) -> None:
    offences = []
    for path in SOURCES:
        if rule is layer_offences and path.as_posix() in EXEMPT:
            continue
        offences += rule(path, (ROOT / path).read_text(encoding="utf-8"))
    assert not offences, "\n" + "\n".join(offences)


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("rl/kl.py", "from ppomax.config import PPOConfig", "rl imports config"),
        ("rl/kl.py", "from ..config import PPOConfig", "rl imports config"),
        ("rl/kl.py", "def f():\n    import ppomax.monitor.log", "kl.py:2: rl imports monitor"),
        ("rl/kl.py", "import numpy as np", "rl imports numpy"),
        ("types.py", "from ppomax.rl.kl import k1", "types imports rl"),
        ("types.py", "from .config import schema", "types imports config"),
        ("config/schema.py", "from ppomax.engine import rundir", "config imports engine"),
        ("data/files.py", "from ppomax import models", "data imports models"),
        ("data/chat.py", "from .. import rollout", "data imports rollout"),
        ("monitor/log.py", "import ppomax.engine.durable as durable", "monitor imports engine"),
        ("models/load.py", "from ppomax.stages.sft import sft", "models imports stages"),
        ("stages/ppo.py", "from ppomax.cli import main", "stages imports cli"),
        ("stages/ppo.py", "import ppomax", "front door"),
        ("stages/ppo.py", "from ppomax import sft", "front door"),
        ("utils/strings.py", "", "unknown layer 'utils'"),
    ],
)
def test_an_import_that_goes_up_is_found(path: str, source: str, expected: str) -> None:
    (offence,) = layer_offences(Path(path), source)
    assert expected in offence


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rl/returns.py", "import math\nimport torch\nfrom ppomax.types import Rollout\nfrom .kl import k1"),
        ("stages/ppo.py", "from ppomax.rollout import collect\nfrom . import update\nfrom ppomax.stages import sft"),
        ("cli/__init__.py", "from ppomax import __version__\nfrom ppomax.stages.sft import sft"),
        ("cli.py", "from ppomax.stages.sft import sft"),
        ("rollout/sampler.py", "from ppomax.models.load import load\nfrom ppomax.config.schema import PPOConfig"),
    ],
)
def test_an_import_that_goes_down_is_allowed(path: str, source: str) -> None:
    assert layer_offences(Path(path), source) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch.load('w.pt', weights_only=True)", "torch.load"),
        ("from torch import load as read\nread('w.pt')", "torch.load"),
        ("import torch as t\nread = t.load", "torch.load"),
        ("import torch\ntorch.save({}, 'w.pt')", "torch.save"),
        ("import pickle", "imports pickle"),
        ("from pickle import loads", "imports pickle"),
        ("import torch\ntorch.manual_seed(0)", "torch.manual_seed"),
        ("import torch\nwith torch.random.fork_rng():\n    torch.manual_seed(0)", "torch.manual_seed"),
        ("import torch\ntorch.cuda.manual_seed_all(0)", "torch.cuda.manual_seed_all"),
        ("import numpy as np\nnp.random.seed(0)", "numpy.random.seed"),
        ("from numpy import random as r\nr.seed(0)", "numpy.random.seed"),
        ("import random\nrandom.seed(0)", "random.seed"),
        ("from transformers import set_seed\nset_seed(0)", "transformers.set_seed"),
        ("load('m', trust_remote_code=True)", "trust_remote_code=True"),
        ("load('m', **{'trust_remote_code': True})", "trust_remote_code=True"),
        ("def load(name, *, trust_remote_code=True): ...", "trust_remote_code=True"),
        ("def load(name, trust_remote_code=True): ...", "trust_remote_code=True"),
        ("class C:\n    trust_remote_code: bool = True", "trust_remote_code=True"),
        ("numpy.load('a.npy', allow_pickle=True)", "allow_pickle=True"),
    ],
)
def test_a_forbidden_call_is_found(source: str, expected: str) -> None:
    offences = call_offences(Path("data/files.py"), source)
    assert offences and all(expected in offence for offence in offences)


def test_one_file_may_seed_and_only_inside_fork_rng() -> None:
    path = Path("models/embedded.py")
    inside = "import torch\nwith torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)\n"
    assert call_offences(path, inside) == []
    (offence,) = call_offences(path, inside + "torch.manual_seed(0)\n")
    assert "embedded.py:4: torch.manual_seed" in offence


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.Generator().manual_seed(0)",
        "import random\nrandom.Random(0)",
        "def f(rng):\n    random = rng\n    random.seed(0)",
        "load('m', trust_remote_code=False)\nload('m', trust_remote_code=config.trust)",
        "from safetensors.torch import load_file\nload_file('w')",
    ],
)
def test_a_harmless_call_is_allowed(source: str) -> None:
    assert call_offences(Path("data/files.py"), source) == []


def test_a_long_file_is_found() -> None:
    assert length_offences(Path("rl/kl.py"), "x = 1\n" * 399) == []
    assert "400 lines" in length_offences(Path("rl/kl.py"), "x = 1\n" * 400)[0]


def test_importing_ppomax_leaves_the_random_states_alone() -> None:
    assert moved_random_states("import ppomax") == set()
    # The star imports every name of the lazy API, and with it nearly all modules; among them rich, which draws the ids
    # of its styles from Python's own generator.
    assert moved_random_states("from ppomax import *") <= {"random"}


def test_a_moved_random_state_is_found() -> None:
    moved = moved_random_states("random.seed(1); numpy.random.seed(1); torch.manual_seed(1)")
    assert moved == {"random", "numpy", "torch"}

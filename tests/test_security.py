"""The promises of SECURITY.md: nothing that comes with a model or with data is run, and nothing leaves the machine."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import ppomax
from ppomax.cli import main
from ppomax.models.embedded import embedded_directory

SOURCE = Path(ppomax.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
SHORT = "--compute.dtype float32 --compute.device cpu"
SECRETS = {
    "HF_TOKEN": "hf_secretOfTheHub",
    "HUGGING_FACE_HUB_TOKEN": "hf_secretOfTheOldHub",
    "WANDB_API_KEY": "secretOfWandb",
    "OPENAI_API_KEY": "sk-secretOfAnotherKind",
    "AWS_SECRET_ACCESS_KEY": "secretOfTheCloud",
}

# The first attempt to reach another machine is written down and ends the command.
WATCHED = """
import json, sys
attempts = []

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind"):
        attempts.append((event, str(arguments[1:] if event.startswith("socket.c") else arguments)))
        raise KeyboardInterrupt

sys.addaudithook(watch)
from ppomax.cli import main
codes = [main(words) for words in json.loads(sys.argv[1])]
print("ATTEMPTS", attempts)
sys.exit(max(codes))
"""


class Evil:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    shutil.copytree(embedded_directory("tiny") or "", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path: Path) -> str:
    rows = [{"prompt": f"hi {i}", "response": "ho"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "rows.jsonl")


def sft(model: Path | str, data: str, run_dir: Path) -> list[str]:
    return f"sft --model {model} --data {data} --heldout 0 --epochs 1 {SHORT} --run-dir {run_dir}".split()


# What comes with a model


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "adapter_model.bin"])
def test_a_pickle_beside_or_in_place_of_weights_is_never_unpickled(
    name: str, model: Path, data: str, tmp_path: Path
) -> None:
    if name != "adapter_model.bin":
        (model / "model.safetensors").unlink()
    else:
        adapter = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 2, "target_modules": ["q_proj"]}
        (model / "adapter_config.json").write_text(json.dumps(adapter))
    (model / name).write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    try:
        assert main(sft(model, data, tmp_path / "run")) == 2
    finally:
        assert not (tmp_path / "owned").exists()


def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(
    model: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on the terminal where trust_remote_code is not set at all."""
    monkeypatch.setattr("builtins.input", lambda *_: (tmp_path / "asked").touch() or "y")
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((model / name).read_text())
        classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
        settings |= {"auto_map": classes, "model_type": "evil"}
        if name == "tokenizer_config.json":
            settings["tokenizer_class"] = "EvilTokenizer"
        (model / name).write_text(json.dumps(settings))
    (model / "evil.py").write_text(
        f"open({str(tmp_path / 'owned')!r}, 'w')\nclass C: pass\nclass M: pass\nclass T: pass\n"
    )
    assert main(sft(model, data, tmp_path / "run")) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "owned").exists() and not (tmp_path / "asked").exists()


def test_a_chat_template_cannot_reach_into_python(model: Path, data: str, tmp_path: Path) -> None:
    template = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch owned') }}"
    )
    (model / "chat_template.jinja").write_text(template)
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        code = main(sft(model, data, tmp_path / "run"))
    except Exception as error:
        code = type(error).__name__
    finally:
        os.chdir(before)
    assert code in (2, "SecurityError")
    assert not (tmp_path / "owned").exists()


# What comes with data and settings


def test_yaml_makes_no_objects(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = f"seed: !!python/object/apply:os.system ['touch {tmp_path / 'owned'}']\n"
    (tmp_path / "evil.yaml").write_text(evil)
    assert main(["sft", "--config", str(tmp_path / "evil.yaml")]) == 2
    assert "not valid YAML" in capsys.readouterr().err
    assert main(sft("tiny", data, tmp_path / "run")) == 0
    (tmp_path / "run" / "config.yaml").write_text(evil)
    assert main(["checkpoint", "export", str(tmp_path / "run")]) == 2
    assert main([*sft("tiny", data, tmp_path / "run"), "--resume"]) == 2
    assert not (tmp_path / "owned").exists()


def test_names_in_data_become_neither_paths_nor_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a row calls its source, prompt or column: files are written in the run directory, under our names."""
    evil = [
        "../../escaped",
        "/tmp/ppomax-escaped",
        "$(touch owned)",
        "; touch owned #",
        "`touch owned`",
        "a\x00b",
        "CON",
    ]
    pairs = [
        {
            "prompt": f"{name} {i}",
            "chosen": f"good {name}",
            "rejected": "bad",
            "source": name,
            name: name,
            "subset": name,
        }
        for i, name in enumerate(evil * 3)
    ]
    here = tmp_path / "deep" / "er"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    words = f"--data pairs.jsonl --heldout 0.3 {SHORT}".split()
    assert main(["reward", "--model", "tiny", "--max-steps", "2", "--min-prompts", "1", *words]) == 0
    prompts = f"--prompts pairs.jsonl --policy tiny --iterations 1 --rollout-batch 8 --minibatch 8 {SHORT}".split()
    settings = ["--critic.pretrain-iterations", "0", "--sampling.max-new-tokens", "4", "--score.by-source"]
    assert main(["ppo", "--reward", "runs/reward/final", *prompts, *settings]) == 0
    assert sorted(path.name for path in here.iterdir()) == ["pairs.jsonl", "runs"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["er"]
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert not Path("/tmp/ppomax-escaped").exists()
    written = {str(path.relative_to(here / "runs")) for path in (here / "runs").rglob("*") if path.is_file()}
    assert not [name for name in written if re.search(r"escaped|touch|CON|[^\w./-]", name)]


def test_no_source_starts_a_program_or_runs_text() -> None:
    forbidden = {"subprocess", "pty", "ctypes", "code", "codeop"}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [(node.module or "").split(".")[0]]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), f"{path}:{node.lineno}"
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert not node.attr.startswith(("system", "popen", "exec", "spawn")), f"{path}:{node.lineno}"
            assert not forbidden & {*names}, f"{path}: {names}"


# What leaves the machine, and what is written down


def watched(commands: list[list[str]], here: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Commands in a process that watches the network, without HF_HUB_OFFLINE."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"PPOMAX_CACHE": str(here / "cache"), "HF_HOME": str(here / "hub"), **more}
    command = [sys.executable, "-c", WATCHED, json.dumps(commands)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here, timeout=280)


@pytest.mark.slow
def test_the_pipeline_reaches_no_network_and_writes_no_secret_down(tmp_path: Path) -> None:
    """Every stage, with tokens in the environment."""
    rows = [{"prompt": f"hi {i}", "response": "ho", "chosen": "ho", "rejected": "no"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = f"--prompts rows.jsonl --sampling.max-new-tokens 4 {SHORT}"
    commands = [
        f"sft --model tiny --data rows.jsonl --epochs 1 --heldout 0.2 {SHORT}",
        f"reward --model runs/sft/final --data rows.jsonl --max-steps 2 --heldout 0.3 {SHORT}",
        f"ppo --iterations 2 --rollout-batch 4 --minibatch 4 --critic.pretrain-iterations 1 {sampling}",
        f"evaluate --samples-per-prompt 1 {sampling}",
        "checkpoint export runs/ppo",
        "report runs/ppo",
    ]
    done = watched([command.split() for command in commands], tmp_path, **SECRETS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ATTEMPTS []"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "report.html", "state.json"} <= {path.name for path in files}
    said = (done.stdout + done.stderr).encode()
    for key, secret in SECRETS.items():
        found = [str(path) for path in files if secret.encode() in path.read_bytes()]
        assert found == [] and secret.encode() not in said, key


@pytest.mark.slow
def test_the_watch_sees_an_attempt(tmp_path: Path) -> None:
    """A hub name reaches out: were the watch blind, the test above would prove nothing."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hi", "response": "ho"}\n')
    done = watched([sft("nobody/no-such-model", "rows.jsonl", tmp_path / "run")], tmp_path)
    assert done.returncode == 130, done.stderr
    assert "huggingface.co" in done.stdout.splitlines()[-1]


# The documents


@pytest.mark.parametrize("document", ["SECURITY.md", "docs/operations.md"])
def test_every_line_of_a_promise_names_a_test_that_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) >= 8
    for file, name in named:
        source = ROOT / file
        assert source.exists() and re.search(rf"^def {name}\(", source.read_text(encoding="utf-8"), re.M), (file, name)
    promises = [
        line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| what", "| fault"))
    ]
    assert promises and all("`tests/" in line for line in promises)


def test_config_yaml_holds_settings_and_nothing_of_the_environment(data: str, tmp_path: Path) -> None:
    assert main(sft("tiny", data, tmp_path / "run")) == 0
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {*stored} == {*ppomax.SFTConfig.model_fields}

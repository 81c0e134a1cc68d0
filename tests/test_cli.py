"""The command line: help, precedence of recipe, file and flags, and the message and exit code of every failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import ppomax
from ppomax.cli import main
from ppomax.cli.parse import ABOUT, VERBS, parse
from ppomax.config import ChatConfig, RewardConfig
from ppomax.config.layers import plain
from ppomax.config.recipes import PPO_RECIPES, REWARD_RECIPES, SFT_RECIPES
from ppomax.errors import SetupError

REWARDS = """
import os
import signal
from pathlib import Path
import torch

def length(prompts, responses, **columns):
    return [float(len(response)) for response in responses]

def interrupts_once(prompts, responses, **columns):
    if not Path("interrupted").exists():
        Path("interrupted").touch()
        signal.raise_signal(signal.SIGINT)
    return length(prompts, responses)

def interrupts_twice(prompts, responses, **columns):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)

def fills_the_gpu(prompts, responses, **columns):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\\nmore about it")

def fills_the_memory(prompts, responses, **columns):
    torch.empty(2**60)

def has_a_bug(prompts, responses, **columns):
    return responses.no_such_thing
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this module's own, and one thread: the tiny model is faster so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPOMAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(Path(ppomax.__file__).parents[1]))
        patch.delenv("PPOMAX_DEBUG", raising=False)
        yield


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with four dialogues and a module of reward functions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cli_rewards", raising=False)
    (tmp_path / "cli_rewards.py").write_text(REWARDS)
    rows = [
        {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "ho"}]} for i in range(4)
    ]
    (tmp_path / "dialogues.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


SFT = [
    *("sft", "--model", "tiny", "--data", "dialogues.jsonl", "--heldout", "0", "--batch-size", "4"),
    *("--epochs", "1", "--compute.dtype", "float32"),
]
PPO = [
    *("ppo", "--policy", "tiny", "--critic.init", "policy", "--prompts", "dialogues.jsonl", "--iterations", "3"),
    *("--rollout-batch", "4", "--minibatch", "4", "--sampling.max-new-tokens", "4", "--compute.dtype", "float32"),
    *("--critic.pretrain-iterations", "0"),
]


def flags_of(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The flag of every setting, nested ones dotted."""
    for name, known in schema.model_fields.items():
        flag = f"{prefix}{name.replace('_', '-')}"
        if isinstance(known.annotation, type) and issubclass(known.annotation, BaseModel):
            yield from flags_of(known.annotation, f"{flag}.")
        else:
            yield flag


# help


def test_help_lists_every_verb_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [*ABOUT] == [
        "sft",
        "reward",
        "ppo",
        "plan",
        "evaluate",
        "rank",
        "chat",
        "report",
        "checkpoint",
        "replay",
        "quickstart",
        "recipes",
        "doctor",
    ]
    assert main([]) == 0
    assert capsys.readouterr().out == out
    for name in ABOUT:
        (line,) = [line for line in out.splitlines() if line.startswith(f"  {name} ")]
        assert line.split(maxsplit=1)[1].split()[:3] == ABOUT[name].split()[:3]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ppomax {ppomax.__version__}\n"


@pytest.mark.parametrize("name", VERBS)
def test_help_of_a_verb_has_every_setting_and_run_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = set(capsys.readouterr().out.replace(",", " ").split())
    expected = [*flags_of(VERBS[name].schema), *VERBS[name].flags]
    assert [flag for flag in expected if f"--{flag}" not in shown] == []


def test_run_flags_stand_where_they_mean_something() -> None:
    assert {name for name, verb in VERBS.items() if "resume" in verb.flags} == {"sft", "reward", "ppo"}
    assert {name for name, verb in VERBS.items() if "recipe" in verb.flags} == {"sft", "reward", "ppo", "plan"}
    assert "fresh" in flags_of(VERBS["quickstart"].schema) and "fresh" not in VERBS["quickstart"].flags


def test_help_shows_the_defaults_of_the_chosen_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    def gae_lambda(*words: str) -> str:
        assert main(["ppo", *words, "--help"]) == 0
        return capsys.readouterr().out.split("λ of GAE.")[1].split(")")[0].split()[-1]

    assert gae_lambda() == "0.9"
    assert gae_lambda("--recipe", "vanilla") == "1.0"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["ppo", "--help"], ["ppo", "--iterations", "0"]])
def test_what_trains_nothing_imports_no_torch(words: list[str]) -> None:
    code = (
        f"import sys; from ppomax.cli import main; main({words!r}); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m ppomax"
    script = f"set -o pipefail; {command} recipes | true && {command} ppo --help | head -n 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "usage: ppomax ppo [-h] [OPTIONS]\n", "")


# flags that are not settings


def test_resume_and_fresh_reach_the_stage() -> None:
    assert parse("sft", ["--resume"]).options == {"resume": True, "fresh": False}
    assert parse("sft", ["--fresh"]).options == {"resume": False, "fresh": True}
    assert parse("evaluate", ["--fresh"]).options == {"fresh": True}
    assert parse("chat", []).options == {}


# recipes


def test_recipes_lists_all_with_their_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out.split()
    for recipes in (PPO_RECIPES, REWARD_RECIPES, SFT_RECIPES):
        for name, function in recipes.items():
            assert name in shown
            assert set((function.__doc__ or "").split()) <= set(shown)


@pytest.mark.parametrize("verb", ["ppo", "reward"])
def test_a_printed_recipe_is_a_config_file(verb: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in VERBS[verb].recipes:
        assert main(["recipes", f"{verb}/{name}"]) == 0
        Path("printed.yaml").write_text(capsys.readouterr().out)
        assert parse(verb, ["--config", "printed.yaml"]).config == VERBS[verb].recipes[name]()


def test_recipes_diff_shows_what_differs_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--diff", "paper", "instructgpt"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [["setting", "paper", "instructgpt"], ["lm_weight", "1.0", "null"]]
    assert main(["recipes", "--diff", "ppo-max", "ppo-max"]) == 0
    assert capsys.readouterr().out == "ppo-max and ppo-max are equal\n"


# misuse: exit code 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pppo", "error: unknown verb 'pppo'; did you mean 'ppo'?"),
        ("xyzzy", "error: unknown verb 'xyzzy'. Known: sft, "),
        ("ppo --recipe vanila", "error: unknown recipe 'vanila'; did you mean 'vanilla'?"),
        ("recipes vanila", "error: unknown recipe 'vanila'; did you mean 'vanilla'?"),
        ("recipes instructgpt", "error: recipe 'instructgpt': found several, expected one of reward/instructgpt, ppo/"),
        ("recipes --diff vanilla paper", "error: recipes 'vanilla' and 'paper' are for different verbs"),
        ("ppo --config nowhere.yaml", "error: nowhere.yaml: cannot be read (No such file or directory)"),
        ("ppo --config .", "error: .: cannot be read (Is a directory)"),
        ("ppo --iterations 0", "iterations: Input should be greater than or equal to 1 (found 0)"),
        ("sft --optim.lr=-1", "optim.lr: Input should be greater than 0 (found -1.0)"),
        ("ppo --iteratons 3", "--iterations INT"),
        ("ppo --kl.coeficient 1", "--kl.coefficient {None}|FLOAT"),
        ("ppo --iterations many", "invalid literal for int() with base 10: 'many'"),
        ("ppo --score.truncated cut", "('score', 'bootstrap')"),
        ("ppo --config", "Missing value for argument"),
        ("ppo --config", "'--config'"),
        ("evaluate --recipe vanilla", "Unrecognized options: --recipe"),
        ("sft --model tiny", "error: --data: found nothing, expected dialogues to learn from"),
        ("sft --model tiny --data nothing.jsonl", "error: nothing.jsonl: no such file"),
        ("sft --model tiny --data broken.jsonl", "error: broken.jsonl"),
        ("report dialogues.jsonl", "error: dialogues.jsonl"),
        ("chat", "error: runs/quickstart/ppo/final: no such directory"),
        ("sft --resume --fresh --model tiny --data dialogues.jsonl", "found both --resume and --fresh"),
    ],
)
def test_misuse_is_one_message_on_stderr(
    words: str, expected: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.jsonl").write_text('{"messages": [\n')
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert expected in err
    assert "Traceback" not in err and "settings." not in err
    assert out == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("iteratons: 3", "c.yaml: unknown key 'iteratons'; did you mean 'iterations'?"),
        ("critic: {optim: {learning_rate: 1}}", "c.yaml: unknown key 'critic.optim.learning_rate'"),
        ("recipe: vanila", "unknown recipe 'vanila'; did you mean 'vanilla'?"),
        ("recipe: [vanilla]", "unknown recipe"),
        ("iterations: none of them", "c.yaml: not a valid PPOConfig:\n  iterations: "),
        ("kl: 0.05", "c.yaml: kl: found 0.05, expected settings of its own: "),
        ("- iterations", "c.yaml: found list, expected settings, one a line"),
        ("a: b: c", "c.yaml: not valid YAML"),
        ("", "c.yaml: found nothing, expected settings, one a line"),
    ],
)
def test_a_wrong_file_is_named_with_the_key(
    text: str, expected: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.yaml").write_text(text)
    assert main(["ppo", "--config", "c.yaml"]) == 2
    assert f"error: {expected}" in capsys.readouterr().err


def test_a_recipe_in_the_file_of_a_verb_without_recipes_is_unknown(here: Path) -> None:
    Path("c.yaml").write_text("recipe: vanilla")
    with pytest.raises(SetupError, match="unknown key 'recipe'"):
        parse("evaluate", ["--config", "c.yaml"])


def test_what_another_process_alone_has_met_reaches_the_launcher(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(here / "error.json"))
    assert main(["report", "nowhere"]) == 2
    assert capsys.readouterr().err == ""
    said = json.loads((here / "error.json").read_text())["message"]
    assert "nowhere" in said["message"] and said["extraInfo"]["py_callstack"] == said["message"]


# runs


def test_a_run_ends_with_its_summary_and_can_be_repeated_from_its_config(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SFT, "--run-dir", "a", "--optim.lr", "1e-3", "--optim.betas", "0.8", "0.9"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2:] == ["a/final", "a/report.html"]
    assert ["steps", "1"] in [line.split() for line in shown]
    stored = parse("sft", ["--config", "a/config.yaml"]).config
    assert plain(stored) == yaml.safe_load(Path("a/config.yaml").read_text())
    assert (stored.optim.lr, stored.optim.betas) == (1e-3, (0.8, 0.9))

    assert main(["sft", "--config", "a/config.yaml", "--run-dir", "b"]) == 0
    weights = [Path(run, "final", "model.safetensors").read_bytes() for run in "ab"]
    assert weights[0] == weights[1]
    capsys.readouterr()

    Path("a/report.html").unlink()
    assert main(["report", "a"]) == 0
    assert capsys.readouterr().out == "a/report.html\n"
    page = Path("a/report.html").read_text()
    assert main(["report", "--run-dir", "a"]) == 0
    assert Path("a/report.html").read_text() == page


def test_the_recipe_that_is_used_says_what_it_changes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PPO, "--recipe", "vanilla", "--reward", "cli_rewards:length", "--iterations", "1"]) == 0
    assert capsys.readouterr().err.startswith("recipe vanilla: PPO with none of the tricks")


def test_ctrl_c_saves_and_says_how_to_go_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*PPO, "--reward", "cli_rewards:interrupts_once"]
    assert main(command) == 130
    err = capsys.readouterr().err
    assert "stopped after iteration 0 and saved" in err and "--resume" in err and "Traceback" not in err
    assert not Path("runs/ppo/final").exists()
    assert main([*command, "--resume"]) == 0
    rows = [json.loads(line) for line in Path("runs/ppo/metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2]


def test_a_second_ctrl_c_stops_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PPO, "--reward", "cli_rewards:interrupts_twice"]) == 130
    assert "stopped at once; nothing after the last checkpoint is kept" in capsys.readouterr().err


@pytest.mark.parametrize("function", ["fills_the_gpu", "fills_the_memory"])
def test_out_of_memory_names_the_flags_to_lower(function: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PPO, "--reward", f"cli_rewards:{function}"]) == 1
    err = capsys.readouterr().err
    assert "error: out of memory" in err and "more about it" not in err
    assert "out of memory in a reward function (" in err and "Lower --rollout-batch, or free some memory" in err


def test_a_full_disk_is_exit_code_1(here: Path) -> None:
    assert main([*SFT, "--run-dir", "whole"]) == 0
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); "
        "from ppomax.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", limited, *SFT, "--run-dir", "full"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: " in done.stderr and "cannot save (File too large" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback_with_the_same_code(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPOMAX_DEBUG", "1")
    assert main(["ppo", "--recipe", "vanila"]) == 2
    err = capsys.readouterr().err
    assert "error: unknown recipe" in err and "Traceback" in err and "recipe_named" in err


def test_a_bug_is_not_hidden(here: Path) -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        main([*PPO, "--reward", "cli_rewards:has_a_bug"])


def test_the_module_runs_as_a_program(here: Path) -> None:
    command = [sys.executable, "-m", "ppomax", "chat", "--model", "tiny", "--sampling.max-new-tokens", "4"]
    done = subprocess.run(command, input="hello\n/quit\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 0


def test_a_terminal_that_knows_ascii_alone_is_no_reason_to_fail() -> None:
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "ppomax", "recipes"], capture_output=True, text=True, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert "?_rm = 1" in done.stdout


def test_schemas_are_the_ones_of_the_python_api() -> None:
    assert [VERBS[name].schema for name in ("chat", "reward")] == [ChatConfig, RewardConfig]


def test_what_runs_alone_says_so_to_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor"]) == 2
    assert "doctor: found 2 processes, expected one" in capsys.readouterr().err

"""Values on their way in and out: settings laid over settings, folders at home, what tables show, what a terminal gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from ppomax.cli import main
from ppomax.cli.parse import parse
from ppomax.cli.show import show_summary
from ppomax.config import (
    CriticConfig,
    EvaluateConfig,
    KLConfig,
    ObjectiveConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    SaveConfig,
    ScoreConfig,
    SFTConfig,
)
from ppomax.config.layers import overlay
from ppomax.config.recipes import PPO_RECIPES, REWARD_RECIPES, SFT_RECIPES
from ppomax.errors import SetupError, printable


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# recipe < file < flags


def test_a_flag_overrides_the_file_which_overrides_the_recipe(here: Path) -> None:
    Path("c.yaml").write_text("gae_lambda: 0.7\nclip_ratio: 0.3\noptim: {lr: 2e-6}\n")
    words = ["--recipe", "vanilla", "--config", "c.yaml", "--clip-ratio", "0.1", "--optim.warmup", "0.5"]
    config = parse("ppo", [*words, "--prompts", "a", "b"]).config
    assert config.kl.coefficient is None  # the recipe's; 0.05 without it
    assert config.gae_lambda == 0.7  # the file's; the recipe has 1.0
    assert config.clip_ratio == 0.1  # the flag's; the file has 0.3
    # One nested group, a setting from each layer.
    assert (config.optim.max_grad_norm, config.optim.lr, config.optim.warmup) == (None, 2e-6, 0.5)
    assert config.prompts == ("a", "b")
    assert config.rollout_batch == PPOConfig().rollout_batch


def test_without_a_layer_the_schema_decides() -> None:
    assert parse("ppo", []).config == PPOConfig()
    assert parse("sft", ["--data", "x"]).config == SFTConfig(data=("x",))


@pytest.mark.parametrize(("name", "recipes"), [("ppo", PPO_RECIPES), ("reward", REWARD_RECIPES), ("sft", SFT_RECIPES)])
def test_every_recipe_can_be_chosen(name: str, recipes: dict[str, Callable[[], BaseModel]]) -> None:
    for recipe, function in recipes.items():
        assert parse(name, ["--recipe", recipe]).config == function()


def test_a_file_may_name_the_recipe_and_a_flag_another(here: Path) -> None:
    Path("c.yaml").write_text("recipe: vanilla\nseed: 5\n")
    assert parse("ppo", ["--config", "c.yaml"]).config == PPO_RECIPES["vanilla"]().model_copy(update={"seed": 5})
    other = parse("ppo", ["--config=c.yaml", "--recipe=ppo-max"])
    assert (other.recipe, other.config.ptx_weight, other.config.seed) == ("ppo-max", 0.1, 5)


def test_none_turns_a_setting_off_in_flags_and_null_in_files(here: Path) -> None:
    Path("c.yaml").write_text("score: {clip: null}\n")
    config = parse("ppo", ["--config", "c.yaml", "--critic.value-clip", "None"]).config
    assert (config.score.clip, config.critic.value_clip) == (None, None)


def test_none_and_off_in_a_file_are_off_where_that_is_possible(here: Path) -> None:
    Path("c.yaml").write_text("reference: None\nscore: {clip: None}\ncompute: {train_layers: off}\n")
    config = parse("ppo", ["--config", "c.yaml"]).config
    assert (config.reference, config.score.clip, config.compute.train_layers) == (None, None, None)


def test_a_key_that_a_file_has_twice_is_an_error_with_its_line(here: Path) -> None:
    Path("c.yaml").write_text("optim: {lr: 1e-4}\nseed: 1\noptim: {warmup: 0.2}\n")
    with pytest.raises(SetupError, match="(?s)c.yaml: not valid YAML: .*found the key 'optim' twice.*line 3, column 1"):
        parse("ppo", ["--config", "c.yaml"])


@pytest.mark.parametrize(
    "words",
    [
        ["--prompts", "a", "--prompts=b"],
        ["--config", "a", "--config", "b"],
        ["--sampling.stop", "a", "--sampling.stop", "b"],
    ],
)
def test_a_list_that_is_given_twice_is_an_error(words: list[str], here: Path) -> None:
    with pytest.raises(SetupError, match=f"{words[0]}: found it twice, of which only the last would count"):
        parse("ppo", words)
    assert parse("ppo", ["--seed", "1", "--seed", "2"]).config.seed == 2  # a script may lay its own over another's


# how values are laid over each other, and shown


def test_sizes_by_source_replace_those_of_a_recipe(tmp_path: Path) -> None:
    words = ["--recipe", "paper-7b-en", "--test", "chat", "100"]
    config = parse("reward", words).config
    assert isinstance(config, RewardConfig)
    assert config.test == {"chat": 100}
    file = tmp_path / "c.yaml"
    file.write_text("test: {code: 5}\noptim: {lr: 3e-6}\n")
    config = parse("reward", ["--recipe", "paper-7b-en", "--config", str(file)]).config
    assert isinstance(config, RewardConfig)
    assert config.test == {"code": 5} and config.optim.lr == 3e-6
    base = RewardConfig(heldout={"a": 1})
    assert overlay(base, {"heldout": 0.1}, origin="x").heldout == 0.1
    assert overlay(base, {"optim": {"lr": 1.0}}, origin="x").heldout == {"a": 1}


@pytest.mark.parametrize("given", ["~/runs/x", Path("~/runs/x")])
def test_a_folder_at_home_is_found_there(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert RewardConfig(run_dir=given).run_dir == Path("/home/somebody/runs/x")
    assert parse("reward", [f"--run-dir={given}"]).config.run_dir == Path("/home/somebody/runs/x")
    assert RewardConfig(run_dir=Path("a/~/b")).run_dir == Path("a/~/b")


@pytest.mark.parametrize(
    ("a", "b", "rows"),
    [
        ("reward/paper", "reward/paper-7b-en", ["test", "test.helpful"]),
        ("reward/paper-7b-en", "reward/paper", ["test", "test.helpful"]),
        ("reward/paper-7b-en", "reward/paper-7b-zh", ["heldout"]),
    ],
)
def test_recipes_that_size_by_number_and_by_source_can_be_compared(
    a: str, b: str, rows: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", "--diff", a, b]) == 0
    settings = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert settings[0] == "setting" and set(rows) <= set(settings)


def test_a_summary_shows_every_sentence_and_no_histogram(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alarms = [f"Alarm number {i}" for i in range(6)]
    show_summary(tmp_path, {"alarms": alarms, "histogram": [1, 2, 3, 4], "pair": [0.1, 0.2]})
    shown = " ".join(capsys.readouterr().out.split())
    assert all(alarm in shown for alarm in alarms)
    assert "pair" in shown and "histogram" not in shown


def test_the_terminal_gets_text_and_no_commands() -> None:
    text = "100\u202f€, \u00a0می\u200cروم, 👩\u200d🌾, 東京\u3000駅\tund\nso"
    assert printable(text) == text
    assert printable("a\x1b[2Jb\u202eb\x00\x9bc\ue000\ufffe") == "a\ufffd[2Jb\ufffdb\ufffd\ufffdc\ufffd\ufffd"


def test_the_best_of_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--best-of", "0"]) == 2
    assert "best_of.0" in capsys.readouterr().err


def test_what_the_planner_advises_is_what_ppo_understands() -> None:
    from ppomax.config.plan import PlanConfig
    from ppomax.stages.plan import plan

    for sizes in ({"model_size": "7b"}, {"model_size": "7b", "reward_size": "3b"}):
        found = plan(PlanConfig(gpus="1x24g", sampling=SamplingConfig(max_new_tokens=512), **sizes))
        advised = [layout["flags"] for layout in found["layouts"]]
        advised += [knob["change"] for knob in found["knobs"] if "GPUs" not in knob["change"]]
        assert any("--compute.gradient-checkpointing" in flags for flags in advised)
        assert any("--compute.train-layers 1" in flags for flags in advised) == ("reward_size" not in sizes)
        for flags in advised:
            parse("ppo", flags.split())


def test_a_group_that_says_little_keeps_the_rest_of_its_fields_default() -> None:
    ours = PPOConfig()
    for warmup in (OptimConfig(warmup=0.0), {"warmup": 0.0}):
        config = PPOConfig(optim=warmup)  # type: ignore[arg-type]
        assert config.optim == ours.optim.model_copy(update={"warmup": 0.0}) and config.optim.lr == 5e-7
    nested = PPOConfig(critic=CriticConfig(optim=OptimConfig(max_grad_norm=None)))
    assert nested.critic.optim.lr == ours.critic.optim.lr != OptimConfig().lr
    assert PPOConfig(save=SaveConfig(keep=3)).save == SaveConfig(every=10, keep=3)
    sampling = EvaluateConfig(sampling=SamplingConfig(max_new_tokens=128)).sampling
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (0.8, 0.9, 1.1)
    assert EvaluateConfig(sampling=SamplingConfig(top_p=None)).sampling.top_p is None
    assert PPOConfig.model_validate(config.model_dump()) == config and PPOConfig(optim=config.optim) == config


@pytest.mark.parametrize("changes", [{"optim": {"lrr": 1.0}}, {"critic": {"optim": {"lr": -1.0}}}, {"optim": 3}])
def test_a_group_is_checked_all_the_same(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PPOConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage": "whole_return", "baseline": "leave_one_out", "samples_per_prompt": 4}, "nothing reads a critic"),
        ({"objective": ObjectiveConfig(max_kl=0.05)}, r"max_kl: found 0\.05 .* only trpo reads it \(objective\.target_kl"),
        ({"objective": ObjectiveConfig(penalty=2.0)}, "only penalty reads it"),
        ({"score": ScoreConfig(length_free=9)}, "length_free: found 9 without score.length_penalty"),
        ({"kl": KLConfig(horizon=77.0)}, "kl.horizon: found 77 without kl.target"),
    ],
)  # fmt: skip
def test_what_would_do_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    from ppomax.stages.ppo_checks import expect_possible

    expect_possible(PPOConfig())
    with pytest.raises(SetupError, match=message):
        expect_possible(PPOConfig(**changes))


def test_names_in_a_summary_are_shown_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    name = "accuracy_by_source.a_source_of_many_letters.accuracy_ci95"
    show_summary(Path("nowhere"), {name: [0.25, 0.5], "reasons": ["One sentence.", "And a second one."]})
    out = capsys.readouterr().out
    assert name in out and "sentence., " not in out

"""Recipes hold the numbers of their sources: the paper's, InstructGPT's."""

from __future__ import annotations

from typing import Any

import pytest

import ppomax
from ppomax.config.recipes import RECIPES
from ppomax.errors import SetupError

# Zheng et al. (2023), sections 3 to 5 and appendices, and Ouyang et al. (2022), as published.
PUBLISHED: dict[str, dict[str, Any]] = {
    "sft/paper": {"epochs": 2, "optim.lr": 9.5e-6, "optim.schedule": "cosine", "optim.floor": 0.1},
    "sft/paper-7b-en": {"batch_size": 1024, "max_length": 2048, "epochs": 2, "optim.lr": 9.5e-6},
    "reward/paper": {"lm_weight": 1.0, "optim.lr": 5e-6, "optim.warmup": 0.1, "min_prompts": 4, "max_prompts": 128},
    "reward/instructgpt": {"lm_weight": None},
    "reward/paper-7b-en": {
        "max_steps": 1000, "test": {"helpful": 700, "harmless": 300}, "heldout": 7500, "optim.lr": 5e-6,
    },
    "reward/paper-7b-zh": {
        "test": {"helpful": 2400, "harmless": 600}, "heldout": {"helpful": 4600, "harmless": 1400},
    },
    "ppo/ppo-max": {
        "kl.coefficient": 0.05, "kl.place": "reward", "gae_lambda": 0.9, "gamma": 1.0, "clip_ratio": 0.2,
        "rollout_batch": 128, "minibatch": 32, "optim.lr": 5e-7, "critic.optim.lr": 1.65e-6, "optim.warmup": 0.1,
        "critic.init": "reward", "score.normalise": True, "score.clip": 5.0, "epochs": 1,
    },
    "ppo/vanilla": {
        "kl.coefficient": None, "score.normalise": False, "score.clip": None, "critic.init": "policy",
        "critic.pretrain_iterations": 0, "critic.value_clip": None, "optim.max_grad_norm": None,
        "critic.optim.max_grad_norm": None, "ptx_weight": None,
    },
    "ppo/instructgpt": {"kl.coefficient": 0.02, "ptx_weight": 27.8, "ema": 0.992, "score.clip": None},
    "ppo/paper-7b-en": {"iterations": 2500, "rollout_batch": 128, "minibatch": 32, "optim.lr": 5e-7},
}  # fmt: skip
EVALUATION = {"sampling.temperature": 0.8, "sampling.top_p": 0.9, "sampling.repetition_penalty": 1.1}


def setting(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_recipe_has_the_published_numbers(name: str) -> None:
    config = ppomax.recipe(name)
    for key, value in PUBLISHED[name].items():
        assert setting(config, key) == value, key


def test_evaluation_samples_as_the_paper_does() -> None:
    for key, value in EVALUATION.items():
        assert setting(ppomax.EvaluateConfig(), key) == value, key


def test_ten_thousand_steps_are_the_papers_run() -> None:
    config = ppomax.recipe("ppo/paper-7b-en")
    assert config.iterations * config.rollout_batch / config.minibatch * config.epochs == 10_000


def test_settings_are_laid_over_a_recipe_as_flags_are() -> None:
    config = ppomax.recipe("ppo/small", critic={"init": "policy"}, prompts=["a.jsonl"], optim={"lr": 1e-3})
    plain = ppomax.recipe("ppo/small")
    assert config.critic.init == "policy" and config.critic.optim == plain.critic.optim
    assert config.optim.lr == 1e-3 and config.optim.warmup == plain.optim.warmup
    assert config.prompts == ("a.jsonl",) and config.compute.train_layers == 10


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ppo/smal", {}, "unknown recipe 'ppo/smal'; did you mean 'ppo/small'"),
        ("small", {}, "unknown recipe 'small'"),
        ("ppo/small", {"iteration": 3}, "recipe ppo/small: unknown key 'iteration'; did you mean 'iterations'"),
        ("ppo/small", {"iterations": 0}, "recipe ppo/small: not a valid PPOConfig"),
        ("ppo/small", {"critic": "policy"}, "recipe ppo/small: critic: found 'policy', expected settings of its own"),
    ],
)
def test_what_is_no_recipe_or_setting_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        ppomax.recipe(name, **settings)


def test_every_recipe_has_a_name_from_python() -> None:
    for verb, recipes in RECIPES.items():
        for short in recipes:
            assert ppomax.recipe(f"{verb}/{short}") == recipes[short]()

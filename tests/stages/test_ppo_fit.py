"""What does not fit a PPO run's models is refused before anything is sampled, with the role, what was found and expected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppomax.config import KLConfig
from ppomax.stages.ppo import ppo
from ppomax.types import SetupError
from stages.conftest import Toys, Trained
from stages.toy import ppo_config, prepared, write_rows

GEMMA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + ' ' + m.content + '<|im_end|>' }}{% endfor %}"
    "{{ '<|im_start|>assistant ' if add_generation_prompt }}"
)
Copy = Callable[..., str]


@pytest.fixture
def changed(tmp_path: Path) -> Copy:
    """A copy of a model directory with other values in its config.json."""

    def copy(folder: str, **values: Any) -> str:
        target = Path(shutil.copytree(folder, tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"))
        written = json.loads((target / "config.json").read_text(encoding="utf-8"))
        (target / "config.json").write_text(json.dumps(written | values), encoding="utf-8")
        return str(target)

    return copy


def refused(trained: Trained, toys: Toys, tmp_path: Path, **changes: Any) -> str:
    """What a run is refused with."""
    policy, prompts = changes.pop("policy", trained.sft), changes.pop("prompts", toys.prompts)
    with pytest.raises(SetupError) as error:
        prepared(ppo_config(tmp_path / "run", policy, prompts, **changes))
    return str(error.value)


def test_positions_of_all_that_read_ids(trained: Trained, toys: Toys, tmp_path: Path, changed: Copy) -> None:
    def too_long(role: str, **changes: Any) -> bool:
        said = refused(trained, toys, tmp_path, **changes)
        return said.startswith(f"{role}: longest prompt + response: ") and "has positions for 40" in said

    short = changed(trained.sft, max_position_embeddings=40)
    assert too_long("policy", policy=short)
    assert too_long("reference", reference=short)
    assert too_long("reward copy-1", reward=(changed(trained.reward, max_position_embeddings=40),))


def test_positions_for_dialogues_of_the_ptx_loss(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    dialogues = write_rows(tmp_path / "ptx.jsonl", [{"prompt": "a?", "response": "b" * 600}])
    settings = {"ptx_data": (dialogues,), "ptx_weight": 0.1, "max_prompt_tokens": 590}
    said = refused(trained, toys, tmp_path, **settings)
    assert said.startswith("ptx_data: longest dialogue: 600 tokens, but the model has positions for 512")


def test_ids_beyond_the_embedding(trained: Trained, toys: Toys, tmp_path: Path, changed: Copy) -> None:
    """A tokenizer to which somebody gave a token, and no row of the model."""
    more = changed(trained.sft)
    tokenizer = AutoTokenizer.from_pretrained(more)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(more)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "A zebra?"}, {"prompt": "A horse?"}] * 8)
    dialogues = write_rows(tmp_path / "ptx.jsonl", [{"prompt": "a?", "response": "A zebra."}])
    found = "found token id 259, expected less than 259, the rows of the model's embedding"
    assert refused(trained, toys, tmp_path, policy=more, prompts=prompts).startswith(f"policy: prompts: {found}")
    ptx = {"ptx_data": (dialogues,), "ptx_weight": 0.1}
    assert refused(trained, toys, tmp_path, policy=more, **ptx).startswith(f"ptx_data: {found}")
    prepared(ppo_config(tmp_path / "run", more, toys.prompts))


def test_an_exact_kl_to_a_reference_with_other_rows(
    trained: Trained, toys: Toys, tmp_path: Path, changed: Copy
) -> None:
    """As models of one family have that pad the same vocabulary to different sizes."""
    padded = changed(trained.sft)
    model = AutoModelForCausalLM.from_pretrained(padded)
    model.resize_token_embeddings(272, mean_resizing=False)
    model.save_pretrained(padded)
    said = refused(trained, toys, tmp_path, reference=padded, kl=KLConfig(estimator="full"))
    assert said.startswith(
        f"kl.estimator full with the reference {padded}: found 272 rows in its unembedding, expected 259"
    )
    ppo(ppo_config(tmp_path / "run", trained.sft, toys.prompts, reference=padded, iterations=2))


def test_a_prompt_that_a_reward_models_template_refuses(
    trained: Trained, toys: Toys, tmp_path: Path, changed: Copy
) -> None:
    by_text = changed(trained.reward)
    (Path(by_text) / "chat_template.jinja").write_text(GEMMA)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Well?"}]
    rows: list[dict[str, Any]] = [{"prompt": "One?"}, {"prompt": "Two?"}]
    prompts = write_rows(tmp_path / "prompts.jsonl", [*rows, {"messages": system, "source": "chat"}])
    said = refused(trained, toys, tmp_path, reward=(f"0.5*{by_text}",), prompts=prompts)
    name = Path(by_text).name
    assert said.startswith(f"reward {name}, prompt 'Well?' (source chat): chat template of ")
    assert "it refuses a dialogue with the roles system, user: System role not supported" in said
    prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, reward=(by_text,)))

"""Data cards and file weights of SFT and PPO; those of the reward model are in test_reward_data.py."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ppomax.data.chat import CHATML
from ppomax.stages.sft import sft
from stages.conftest import Trained
from stages.toy import dialogue_rows, ppo_config, prepared, prompt_rows, sft_config, write_rows


def card(run: Path) -> dict[str, Any]:
    return json.loads((run / "data.json").read_text(encoding="utf-8"))


def test_sft_reads_a_heavy_file_twice_and_its_held_out_rows_once(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", dialogue_rows()[:40])
    summary = sft(sft_config(tmp_path / "run", f"{data}#weight=2", heldout=8, epochs=1))
    assert summary["rows"] == 64
    parts = card(tmp_path / "run")["parts"]
    assert {name: part["rows"] for name, part in parts.items()} == {"learn": 32, "heldout": 8}
    assert card(tmp_path / "run")["sources"]["default"]["weights"] == [2.0]


def test_ppo_prompts_and_ptx_follow_the_weights_of_their_files(tmp_path: Path, trained: Trained) -> None:
    heavy, light = (write_rows(tmp_path / f"{i}.jsonl", prompt_rows(40)[i::2]) for i in (0, 1))
    ptx = write_rows(tmp_path / "ptx.jsonl", dialogue_rows()[:10])
    config = ppo_config(
        tmp_path / "run", trained.sft, f"{heavy}#weight=3", ptx_data=(f"{ptx}#weight=2",), ptx_weight=0.1
    )
    config = config.model_copy(update={"prompts": (*config.prompts, f"{light}#weight=0.5")})
    job = prepared(config)
    times = Counter(prompt.key for prompt in job.prompts)
    heavy_keys = {prompt.key for prompt in job.prompts if prompt.weight == 3}
    assert len(heavy_keys) == 20 and {times[key] for key in heavy_keys} == {3}
    light_times = [count for key, count in times.items() if key not in heavy_keys]
    assert set(light_times) == {1} and 3 < len(light_times) < 17
    assert [len(ids) > 0 for ids in job.prompt_ids] == [True] * len(job.prompts)
    assert len(job.ptx) == 20


def test_prompts_that_the_chat_template_refuses_are_left_out_and_counted(tmp_path: Path, trained: Trained) -> None:
    (tmp_path / "strict.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
    )
    asked = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}
    data = write_rows(tmp_path / "p.jsonl", [asked, *prompt_rows(8)])
    config = ppo_config(tmp_path / "run", trained.sft, data)
    compute = config.compute.model_copy(update={"chat_template": str(tmp_path / "strict.jinja")})
    job = prepared(config.model_copy(update={"compute": compute}))
    assert len(job.prompts) == 8
    reason = "refused by the chat template: System role not supported"
    assert card(tmp_path / "run")["dropped"] == {reason: {"rows": 1, "first": f"{data}:1"}}

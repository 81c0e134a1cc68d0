"""Chinese from file to report: split, rendered, learnt, ranked, sampled, measured and shown as it was written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ppomax.config import EvaluateConfig, SamplingConfig
from ppomax.data.chat import render_dialogue, render_prompt, render_response
from ppomax.data.readers import read_dialogues, read_pairs, read_prompts
from ppomax.models.load import load_tokenizer
from ppomax.stages.evaluate import evaluate
from ppomax.stages.ppo import ppo
from ppomax.stages.reward import reward
from ppomax.stages.sft import sft
from stages.drawing import every_picture
from stages.toy import ppo_config, reward_config, sft_config, write_rows

MOSS = Path(__file__).parents[2] / "../shared/data/moss-zh-prompts.json"
THINGS = ["河", "山", "月亮", "面包", "雨", "书", "猫", "灯", "茶", "雪", "桥", "风"]


def dialogues() -> list[dict[str, Any]]:
    """One turn and two, with marks, blanks and Latin letters among the characters."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"{thing}是什么？", "response": f"{thing}很好，我喜欢{thing}。"} for thing in THINGS
    ]
    rows += [
        {"messages": [
            {"role": "system", "content": "请简短回答。"}, {"role": "user", "content": f"你好，说说{thing}。"},
            {"role": "assistant", "content": "好的！"}, {"role": "user", "content": f"{thing}（river）呢？"},
            {"role": "assistant", "content": f"“{thing}”有 3 种。"},
        ]}
        for thing in THINGS
    ]  # fmt: skip
    return rows


def pairs() -> list[dict[str, Any]]:
    return [
        {"prompt": f"{a}和{b}？", "chosen": f"{a}好，{b}也好。", "rejected": "不知道。"}
        for a in THINGS
        for b in THINGS[:3]
    ]


@pytest.fixture(autouse=True)
def drawn() -> Iterator[None]:
    with every_picture():
        yield


def test_from_file_to_report(tmp_path: Path) -> None:
    data = {
        "dialogues": write_rows(tmp_path / "d.jsonl", dialogues()), "pairs": write_rows(tmp_path / "p.jsonl", pairs()),
        "prompts": write_rows(tmp_path / "q.jsonl", [{"prompt": f"{thing}是什么？"} for thing in THINGS]),
    }  # fmt: skip
    sft(sft_config(tmp_path / "sft", data["dialogues"], epochs=1))
    policy = str(tmp_path / "sft" / "final")
    summary = reward(reward_config(tmp_path / "reward", policy, data["pairs"]))
    assert summary["accuracy"] > 0.9
    model = str(tmp_path / "reward" / "final")
    ppo(ppo_config(tmp_path / "ppo", policy, data["prompts"], reward=(model,), iterations=2))
    evaluate(
        EvaluateConfig(
            run_dir=tmp_path / "evaluate", policy=str(tmp_path / "ppo" / "final"), baseline=policy,
            prompts=(data["prompts"],), reward=model, sampling=SamplingConfig(max_new_tokens=12), samples_per_prompt=1,
        )
    )  # fmt: skip
    for run, words in {"reward": "也好。", "ppo": "是什么？", "evaluate": "是什么？"}.items():
        samples = [json.loads(line) for line in (tmp_path / run / "samples.jsonl").read_text("utf-8").splitlines()]
        assert samples and words in json.dumps(samples, ensure_ascii=False)
        assert words in (tmp_path / run / "report.html").read_text("utf-8")
    last = json.loads((tmp_path / "ppo" / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    card = json.loads((tmp_path / "ppo" / "data.json").read_text("utf-8"))
    assert card["kept"] == card["parts"]["prompts"]["rows"] == len(THINGS)
    # The prompts have pairs of characters to be on the topic of.
    assert last["on_topic_left_out"] == 0


@pytest.mark.parametrize("model", ["tiny", "smollm2-135m"])
def test_ids_give_the_text_back(model: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model)
    rows, _ = read_dialogues(write_rows(tmp_path / "d.jsonl", dialogues()))
    for dialogue in rows:
        ids, mask = render_dialogue(tokenizer, dialogue, max_length=4096)
        answers = tokenizer.decode([i for i, counts in zip(ids, mask, strict=True) if counts])
        said = "".join(m["content"] + tokenizer.eos_token for m in dialogue.messages if m["role"] == "assistant")
        assert answers == said
    (pair, *_), _ = read_pairs(write_rows(tmp_path / "p.jsonl", pairs()))
    assert pair.chosen in tokenizer.decode(render_response(tokenizer, pair.chosen))


@pytest.mark.skipif(not MOSS.is_file(), reason=f"{MOSS.name} is not here")
def test_real_prompts_of_several_turns(tmp_path: Path) -> None:
    turns = json.loads(MOSS.read_text("utf-8"))
    rows = [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(dialogue)]}
        for dialogue in turns
    ]
    prompts, report = read_prompts(write_rows(tmp_path / "moss.jsonl", rows))
    assert report.kept == len(rows) == 31 and not report.dropped
    tokenizer = load_tokenizer("smollm2-135m")
    for prompt in prompts:
        decoded = tokenizer.decode(render_prompt(tokenizer, prompt.messages))
        assert all(message["content"] in decoded for message in prompt.messages)

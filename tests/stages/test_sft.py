"""SFT, whole: it learns, its schedule and plan are exact, and what it writes is what plain transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppomax.config import OptimConfig
from ppomax.data.chat import CHATML
from ppomax.data.readers import read_dialogues
from ppomax.data.split import split_by_key
from ppomax.engine.optimiser import learning_rate
from ppomax.models.embedded import embedded_directory
from ppomax.stages.sft import sft
from ppomax.types import DataError, SetupError
from stages.conftest import Toys, Trained
from stages.toy import (
    CALM,
    FLOAT32,
    dialogue_rows,
    distance,
    file_hashes,
    metrics,
    same_bits,
    sft_config,
    weights,
    write_rows,
)


def summary(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))


def test_the_loss_falls_on_rows_that_it_learns_and_on_rows_that_it_does_not(trained: Trained) -> None:
    rows = metrics(trained.sft_run)
    assert rows[0]["loss"] > 5.4  # about ln 259: the tiny model is random
    assert rows[-1]["loss"] < 0.65 * rows[0]["loss"]
    heldout = [row["heldout_loss"] for row in rows if "heldout_loss" in row]
    assert heldout[-1] < 0.65 * heldout[0]
    assert summary(trained.sft_run)["heldout_loss"] == heldout[-1]


def test_the_held_out_loss_is_that_of_plain_transformers(trained: Trained, toys: Toys) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained.sft)
    tokenizer = AutoTokenizer.from_pretrained(trained.sft)
    _, heldout = split_by_key(read_dialogues(toys.dialogues)[0], 0.1, 0)
    total = count = 0.0
    for dialogue in heldout:
        prompt = tokenizer.apply_chat_template(list(dialogue.messages[:-1]), add_generation_prompt=True)["input_ids"]
        answer = tokenizer(dialogue.messages[-1]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        total -= float(logprobs[-len(answer) :].sum())
        count += len(answer)
    assert summary(trained.sft_run)["heldout_loss"] == pytest.approx(total / count, rel=1e-5)


def test_trap_22_rate_and_number_of_steps_are_those_of_the_plan(
    toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = OptimConfig(lr=1e-3, warmup=0.25, schedule="linear", floor=0.2)
    sft(sft_config(tmp_path / "run", toys.dialogues, epochs=0.6, batch_size=20, heldout=0.0, optim=optim))
    # 225 dialogues in batches of 20 are 12 steps; 0.6 × 12 = 7.2, and a quarter of 7 rounds to 2 steps of warm-up.
    rates = [row["lr"] for row in metrics(tmp_path / "run")]
    expected = [learning_rate(s, 7, peak=1e-3, warmup=0.25, schedule="linear", floor=0.2) for s in range(7)]
    assert rates == expected
    assert rates[:3] == pytest.approx([0.5e-3, 1e-3, 1e-3])
    assert rates[-1] == pytest.approx(0.2e-3)
    printed = capsys.readouterr().err
    assert "7 = 0.6 epochs × 12 of 20 dialogues" in printed
    assert "linear, peak 0.001, warm-up 2 steps, last step 0.0002" in printed
    assert summary(tmp_path / "run")["steps"] == 7


def test_trap_19_the_size_of_microbatches_changes_nothing(toys: Toys, tmp_path: Path) -> None:
    runs = {}
    for budget in (64, 4096):
        compute = FLOAT32.model_copy(update={"tokens_per_microbatch": budget})
        config = sft_config(
            tmp_path / str(budget), toys.dialogues, epochs=0.2, heldout=0.0, compute=compute, optim=CALM
        )
        sft(config)
        runs[budget] = metrics(config.run_dir), weights(config.run_dir / "final")
    for name in ("loss", "grad_norm"):
        small, large = ([row[name] for row in runs[budget][0]] for budget in (64, 4096))
        assert small == pytest.approx(large, rel=1e-5)
    assert distance(runs[64][1], runs[4096][1]) < 1e-5


def test_trap_10_frozen_layers_and_embeddings_stay_bit_for_bit(trained_top: Trained) -> None:
    before, after = weights(embedded_directory("tiny") or Path()), weights(Path(trained_top.sft))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "layers.1." in name or name == "model.norm.weight"}
    rows = metrics(trained_top.sft_run)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1


def test_trap_31_no_prompt_is_both_learnt_and_held_out(
    toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = dialogue_rows()[:60]
    twice = [*rows, *({**row, "response": f"{row['response']} Yes."} for row in rows)]
    everything = read_dialogues(write_rows(tmp_path / "twice.jsonl", twice))[0]
    learn, heldout = split_by_key(everything, 0.3, 0)
    assert not {d.messages[0]["content"] for d in learn} & {d.messages[0]["content"] for d in heldout}
    sft(sft_config(tmp_path / "run", str(tmp_path / "twice.jsonl"), heldout=0.3, epochs=0.1))
    assert f"{len(learn)} to learn" in (said := capsys.readouterr().err)
    assert f"{len(heldout)} held out" in said
    assert len(learn) % 2 == len(heldout) % 2 == 0


def test_the_same_run_gives_the_same_rows_and_weights_bit_for_bit(toys: Toys, tmp_path: Path) -> None:
    configs = [sft_config(tmp_path / name, toys.dialogues, epochs=0.5) for name in "ab"]
    for config in configs:
        sft(config)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert same_bits(weights(tmp_path / "a" / "final"), weights(tmp_path / "b" / "final"))


def test_a_finished_run_is_neither_repeated_nor_touched(
    toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sft_config(tmp_path / "run", toys.dialogues, epochs=0.1)
    first = sft(config)
    before = file_hashes(config.run_dir)
    capsys.readouterr()
    assert sft(config) == sft(config, resume=True) == first
    assert file_hashes(config.run_dir) == before
    assert "already finished; --fresh starts over" in capsys.readouterr().err
    again = sft(config, fresh=True)
    assert again["steps"] == first["steps"]
    assert file_hashes(config.run_dir).keys() >= before.keys() - {k for k in before if k.startswith("events.")}
    assert file_hashes(config.run_dir)["final/model.safetensors"] == before["final/model.safetensors"]


def test_a_long_dialogue_is_cut_and_plain_text_is_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "apple?", "response": "bread " * 40}, {"text": "seven stones"}, {"prompt": "x" * 90, "response": "y"}
    ]  # fmt: skip
    data = write_rows(tmp_path / "rows.jsonl", rows)
    result = sft(sft_config(tmp_path / "run", data, heldout=0.0, max_length=64, epochs=1))
    assert result["rows"] == 2
    assert "2 cut at 64 tokens, 1 left out because no answer fits" in capsys.readouterr().err
    # "seven stones" is 12 bytes, of which the first has nothing before it; "apple?" takes 25 ids before its answer.
    assert metrics(tmp_path / "run")[0]["tokens"] == 11 + 64 - 25


STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% endfor %}" + CHATML
)


def test_a_row_that_the_chat_template_refuses_is_left_out_and_stands_on_the_data_card(tmp_path: Path) -> None:
    (tmp_path / "strict.jinja").write_text(STRICT, encoding="utf-8")
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    data = write_rows(tmp_path / "rows.jsonl", [*dialogue_rows()[:9], {"messages": turns}])
    compute = FLOAT32.model_copy(update={"chat_template": str(tmp_path / "strict.jinja")})
    assert sft(sft_config(tmp_path / "run", data, heldout=3, epochs=1, compute=compute))["rows"] == 6
    card = json.loads((tmp_path / "run" / "data.json").read_text(encoding="utf-8"))
    reason = "refused by the chat template: System role not supported"
    assert (card["read"], card["kept"]) == (10, 9)
    assert card["dropped"] == {reason: {"rows": 1, "first": f"{data}:10"}}
    alone = write_rows(tmp_path / "alone.jsonl", [{"messages": turns}])
    with pytest.raises(DataError, match=rf"no usable row is left: read 1 rows, kept 0; dropped 1 {reason} .*alone.*:1"):
        sft(sft_config(tmp_path / "none", alone, heldout=0.0, compute=compute))


def test_held_out_rows_that_begin_as_rows_that_are_learnt_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every answer of a dialogue is learnt, so the one to the prompt of a shorter row, too."""
    plain = write_rows(tmp_path / "plain.jsonl", dialogue_rows()[:5])
    longer = [
        {"messages": [
            {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]},
            {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Nothing."},
        ]}
        for row in dialogue_rows()[2:8]
    ]  # fmt: skip
    longer_file = write_rows(tmp_path / "longer.jsonl", longer)
    config = sft_config(tmp_path / "run", f"{plain}#source=plain", heldout={"plain": 4}, epochs=1)
    config = config.model_copy(update={"data": (*config.data, f"{longer_file}#source=longer")})
    assert sft(config)["rows"] == 7
    _, held = split_by_key(read_dialogues([*config.data])[0], {"plain": 4}, 0)
    overlap = len({d.messages[0]["content"] for d in held} & {row["prompt"] for row in dialogue_rows()[2:8]})
    assert overlap in (2, 3)
    assert json.loads((tmp_path / "run" / "data.json").read_text(encoding="utf-8"))["heldout_learnt_too"] == overlap
    assert f"4 held out, of {overlap} of which an answer's prompt is learnt too" in capsys.readouterr().err
    sft(sft_config(tmp_path / "other", plain, heldout=2, epochs=1))
    assert json.loads((tmp_path / "other" / "data.json").read_text(encoding="utf-8"))["heldout_learnt_too"] == 0


def test_held_out_rows_that_do_not_fit_are_named_as_such(tmp_path: Path) -> None:
    short, long = [{"prompt": f"q{i}?", "response": "Yes."} for i in range(6)], {"prompt": "x" * 90, "response": "y"}
    data = f"{write_rows(tmp_path / 'long.jsonl', [long])}#source=long"
    config = sft_config(tmp_path / "run", data, heldout={"long": 1}, max_length=64)
    config = config.model_copy(update={"data": (*config.data, write_rows(tmp_path / "short.jsonl", short))})
    with pytest.raises(DataError, match="^none of 1 dialogues that heldout sets aside has an answer within 64 tokens; "
                       "raise max_length"):  # fmt: skip
        sft(config)
    with pytest.raises(DataError, match="^none of 6 dialogues has an answer within 8 tokens"):
        sft(sft_config(tmp_path / "none", config.data[1], heldout=0.0, max_length=8))


def test_held_out_rows_beyond_the_models_positions_are_refused_too(tmp_path: Path) -> None:
    short, long = [{"prompt": f"q{i}?", "response": "Yes."} for i in range(6)], {"prompt": "x" * 600, "response": "y"}
    data = f"{write_rows(tmp_path / 'long.jsonl', [long])}#source=long"
    config = sft_config(tmp_path / "run", data, heldout={"long": 1}, max_length=1024)
    config = config.model_copy(update={"data": (*config.data, write_rows(tmp_path / "short.jsonl", short))})
    with pytest.raises(SetupError, match="longest dialogue: .* positions for 512"):
        sft(config)

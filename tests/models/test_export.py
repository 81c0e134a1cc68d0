"""What is exported means the same to plain transformers: the same logits, and the score where it is defined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.architectures import FLOAT32, batch_of, make_model, plain_scores, policy, reloaded, save_model, scalar
from ppomax.data.chat import CHATML, ROLE_TAGS, render_prompt, render_response
from ppomax.models.load import (
    ending_at_eos,
    export,
    export_scalar,
    load_causal_lm,
    load_scalar_lm,
    load_tokenizer,
    pad_that_ends_no_turn,
)
from ppomax.models.players import Scalar, at_end
from ppomax.types import Message, token_batch

TOLERANCE = 1e-5
# ChatML as most models carry it: a newline after every turn, which would move the pooled token off the eos.
NEWLINE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TAIL = CHATML + "{% if not add_generation_prompt %}{{ '\\n<|endoftext|>' }}{% endif %}"
TEMPLATES = {"own": CHATML, "newline": NEWLINE, "role-tags": ROLE_TAGS, "tail": TAIL}
DIALOGUES = [
    ("Hello?", "Hi."),
    ("A much longer question, about the sea?", "The sea is wide, and deep, and 海."),
    ("x", ""),
    ("Ends with a newline?", "yes\n"),
]


def user(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def tensors_on_disk(folder: Path) -> set[str]:
    """Names of all files that hold weights."""
    return {p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt")}


@pytest.fixture
def reward_model(lively: str) -> Any:
    """A scalar model in memory with a head that tells answers apart."""
    return load_scalar_lm(lively, FLOAT32, fresh_head_seed=4)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_trap_24_plain_transformers_reproduces_the_scores(
    reward_model: Any, tiny_tokenizer: Any, tmp_path: Path, template: str, side: str
) -> None:
    tiny_tokenizer.chat_template = TEMPLATES[template]
    prompts = [render_prompt(tiny_tokenizer, user(q)) for q, _ in DIALOGUES]
    answers = [render_response(tiny_tokenizer, a) for _, a in DIALOGUES]
    batch = token_batch(prompts, answers)
    with torch.no_grad():
        player = Scalar(reward_model, train_layers=None, trained=False)
        expected = at_end(player(batch).values_BT, batch)
    assert float(expected.std()) > 0.05
    export_scalar(reward_model, tiny_tokenizer, tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding_side=side)
    texts = [
        tokenizer.apply_chat_template([*user(q), Message(role="assistant", content=a)], tokenize=False)
        for q, a in DIALOGUES
    ]
    read = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    assert read.attention_mask.sum(1).tolist() == batch.length_B.tolist(), "a ragged batch, whole"
    found = plain_scores(tmp_path, read.input_ids, read.attention_mask)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    # One row by itself, without padding.
    alone = plain_scores(tmp_path, torch.tensor([prompts[1] + answers[1]]), torch.ones(1, len(prompts[1] + answers[1])))
    assert float(alone) == pytest.approx(float(expected[1]), abs=TOLERANCE)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_exported_template_ends_an_answer_at_its_eos_and_leaves_prompts_alone(
    tiny_tokenizer: Any, template: str
) -> None:
    tiny_tokenizer.chat_template = TEMPLATES[template]
    answered = [*user("Hello?\n"), Message(role="assistant", content="Hi. ")]
    question = [*answered, *user("And? ")]
    before = [render_prompt(tiny_tokenizer, turns) for turns in (user("x\n"), question)]
    unanswered = tiny_tokenizer.apply_chat_template(question, tokenize=False)
    response = render_response(tiny_tokenizer, "Hi. ")
    tiny_tokenizer.chat_template = ending_at_eos(tiny_tokenizer)
    text = tiny_tokenizer.apply_chat_template(answered, tokenize=False)
    assert text.endswith("Hi. <|im_end|>" if template != "role-tags" else "Hi.<|im_end|>")
    assert [render_prompt(tiny_tokenizer, turns) for turns in (user("x\n"), question)] == before
    assert tiny_tokenizer.apply_chat_template(question, tokenize=False) == unanswered
    assert render_response(tiny_tokenizer, "Hi. ") == response
    assert ending_at_eos(tiny_tokenizer) == tiny_tokenizer.chat_template, "once is enough"


def test_the_pad_of_an_exported_reward_model_ends_no_turn(
    reward_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    assert tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id
    export_scalar(reward_model, tiny_tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id == config["pad_token_id"] == 0 != tokenizer.eos_token_id == 2
    assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_a_pad_is_found_for_any_tokenizer(tiny_tokenizer: Any) -> None:
    # The tokenizer's own pad first, then unk, then bos; a text token only where every special token is the eos.
    tiny_tokenizer.pad_token = "<|im_start|>"
    assert pad_that_ends_no_turn(tiny_tokenizer, 259) == 1
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    assert pad_that_ends_no_turn(tiny_tokenizer, 259) == 0
    tiny_tokenizer.unk_token = None
    assert pad_that_ends_no_turn(tiny_tokenizer, 259) == 1
    tiny_tokenizer.unk_token = tiny_tokenizer.bos_token = tiny_tokenizer.eos_token
    assert pad_that_ends_no_turn(tiny_tokenizer, 259) == 258  # the rarest, and no "!" as a low id would be
    assert pad_that_ends_no_turn(tiny_tokenizer, 100) == 99


def test_a_pad_beyond_the_embeddings_is_not_written(reward_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tiny_tokenizer.pad_token_id == 259, "the model has no such row"
    export_scalar(reward_model, tiny_tokenizer, tmp_path)
    assert load_scalar_lm(str(tmp_path), FLOAT32).config.pad_token_id == 0
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == 0


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_exporting_leaves_config_and_tokenizer_as_they_were(
    reward_model: Any, tiny_tokenizer: Any, tmp_path: Path, pad: str | None
) -> None:
    tiny_tokenizer.chat_template = NEWLINE
    tiny_tokenizer.pad_token = pad

    def state() -> tuple[Any, ...]:
        # `architectures` is written by save_pretrained itself: the class that was saved.
        config = {k: v for k, v in reward_model.config.to_dict().items() if k != "architectures"}
        return (
            config, tiny_tokenizer.chat_template, tiny_tokenizer.pad_token,
            dict(tiny_tokenizer.special_tokens_map), tiny_tokenizer.get_vocab(), len(tiny_tokenizer),
            tiny_tokenizer("a<|im_end|>b")["input_ids"],
        )  # fmt: skip

    before = state()
    batch = batch_of()
    values = Scalar(reward_model, train_layers=None, trained=False)(batch).values_BT
    export_scalar(reward_model, tiny_tokenizer, tmp_path / "a")
    export(reward_model, tiny_tokenizer, tmp_path / "b")
    assert state() == before
    assert torch.equal(Scalar(reward_model, train_layers=None, trained=False)(batch).values_BT, values)


def test_a_failed_export_leaves_them_too(reward_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    before = reward_model.config.pad_token_id, tiny_tokenizer.pad_token, tiny_tokenizer.chat_template
    with pytest.raises(Exception, match=r"."):
        export_scalar(reward_model, tiny_tokenizer, tmp_path / "file" / "below")
    assert (reward_model.config.pad_token_id, tiny_tokenizer.pad_token, tiny_tokenizer.chat_template) == before


def test_a_scalar_model_comes_back_bit_for_bit(reward_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    export_scalar(reward_model, tiny_tokenizer, tmp_path)
    assert tensors_on_disk(tmp_path) == {"model.safetensors"}
    again, expected = load_scalar_lm(str(tmp_path), FLOAT32).state_dict(), reward_model.state_dict()
    assert again.keys() == expected.keys() and all(torch.equal(again[k], expected[k]) for k in expected)


@pytest.mark.parametrize("family", ["llama", "llama-untied", "gpt2"])
def test_a_policy_comes_back_with_equal_logits(tiny_tokenizer: Any, tmp_path: Path, family: str) -> None:
    folder = save_model(family, tmp_path / "first")
    player = policy(folder, trained=True)
    with torch.no_grad():
        for parameter in player.trained_parameters().values():
            parameter.mul_(1.1)
    export(player.model, tiny_tokenizer, tmp_path / "second")
    assert tensors_on_disk(tmp_path / "second") == {"model.safetensors"}
    plain = reloaded(AutoModelForCausalLM, tmp_path / "second")
    ids = batch_of().ids_BT
    with torch.no_grad():
        assert torch.equal(load_causal_lm(str(tmp_path / "second"), FLOAT32)(ids).logits, player.model(ids).logits)
        torch.testing.assert_close(plain(ids).logits, player.model(ids).logits, atol=5 * TOLERANCE, rtol=0)
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert tied == (family != "llama-untied")
    assert AutoTokenizer.from_pretrained(tmp_path / "second").chat_template == tiny_tokenizer.chat_template


def test_a_policy_whose_trunk_is_shared_is_exported_whole(lively: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from ppomax.models.share import share_trunk

    first, other = policy(lively, train_layers=1), policy(lively, train_layers=1, trained=True)
    share_trunk(first, other, roles=("policy", "reference"))
    with torch.no_grad():
        other.base.norm.weight.mul_(1.5)
    export(other.model, tiny_tokenizer, tmp_path)
    ids = batch_of().ids_BT
    with torch.no_grad():
        expected = other.model(ids).logits
        torch.testing.assert_close(
            reloaded(AutoModelForCausalLM, tmp_path)(ids).logits, expected, atol=TOLERANCE, rtol=0
        )


def test_a_reward_model_of_bfloat16_is_exported_in_bfloat16(lively: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("llama").to(torch.bfloat16)
    export(model, tiny_tokenizer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_tokenizer(str(tmp_path)).eos_token_id == 2


def test_a_critic_that_was_a_reward_model_exports_like_one(
    lively_reward: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    critic = scalar(lively_reward, trained=True)
    with torch.no_grad():
        critic.head.weight.mul_(0.5)
    export_scalar(critic.model, tiny_tokenizer, tmp_path)
    batch = batch_of()
    torch.testing.assert_close(
        scalar(str(tmp_path))(batch).values_BT, 0.5 * scalar(lively_reward)(batch).values_BT, atol=TOLERANCE, rtol=0
    )

"""Reward models: the same score by ids, by rows and by text, whatever the batch, also through another tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models.architectures import enliven, plain_scores, scalar
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from ppomax.config import ModelConfig
from ppomax.data.chat import ROLE_TAGS, render_prompt, render_response
from ppomax.models.load import export_scalar, load_tokenizer, same_vocabulary
from ppomax.rewards.model import RewardModel
from ppomax.stages.inputs import compute_of
from ppomax.stages.players import load_reward_model
from ppomax.types import Message, SetupError, token_batch

TOLERANCE = 1e-4
FLOAT32 = ModelConfig(dtype="float32")
DIALOGUES = [
    ([Message(role="user", content="Hello there.")], "Hi!"),
    ([Message(role="user", content="What is the sea, and why is it salt?")], "Water, with salt of the rocks in it."),
    (
        [
            Message(role="system", content="Be brief."),
            Message(role="user", content="One?"),
            Message(role="assistant", content="Two."),
            Message(role="user", content="And then?"),
        ],
        "",
    ),
]
PROMPTS, ANSWERS = [d[0] for d in DIALOGUES], [d[1] for d in DIALOGUES]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, model_cache: Path) -> str:
    """A reward model with a word-piece vocabulary, an eos and a template of its own."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text for prompt, answer in DIALOGUES for text in (answer, *(m["content"] for m in prompt))] * 3,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=["<unk>", "</s>", "<pad>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    fast.chat_template = ROLE_TAGS
    config = AutoConfig.for_model(
        "qwen2", vocab_size=330, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, eos_token_id=1, pad_token_id=1, num_labels=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForSequenceClassification.from_config(config)
    enliven(model)
    folder = tmp_path_factory.mktemp("foreign")
    export_scalar(model, fast, folder)
    return str(folder)


@pytest.fixture
def own(lively_reward: str, tiny_tokenizer: Any) -> RewardModel:
    """A reward model with the policy's vocabulary and room for two or three rows a microbatch."""
    return RewardModel("own", scalar(lively_reward), tiny_tokenizer, True, 150, 256)


def rows_of(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    return [(render_prompt(tokenizer, p), render_response(tokenizer, a)) for p, a in DIALOGUES]


def test_trap_03_a_score_does_not_depend_on_the_batch(own: RewardModel) -> None:
    rows = rows_of(own.tokenizer) * 2
    together = own.score_rows(rows)
    assert max(together) - min(together) > 0.05
    for i in range(len(rows)):
        assert own.score_rows([rows[i]]) == pytest.approx([together[i]], abs=TOLERANCE)
    assert own.score_rows(rows[::-1])[::-1] == pytest.approx(together, abs=TOLERANCE)
    batch = token_batch([p for p, _ in rows], [r for _, r in rows])
    assert own.score_ids(batch).tolist() == pytest.approx(together, abs=TOLERANCE)


def test_trap_24_both_sides_of_a_pair_are_read_at_their_own_end(own: RewardModel) -> None:
    prompt, answer = rows_of(own.tokenizer)[0]
    longer = [*answer[:-1], 90, 91, 92, 93, 94, 2]
    pair = own.score_ids(token_batch([prompt, prompt], [answer, longer]))
    alone = [float(own.score_ids(token_batch([prompt], [r]))) for r in (answer, longer)]
    assert pair.tolist() == pytest.approx(alone, abs=TOLERANCE)
    # Padded with the long answer's own ids, the short one still ends where it ends.
    batch = token_batch([prompt, prompt], [answer, longer], pad=93)
    assert own.score_ids(batch).tolist() == pytest.approx(alone, abs=TOLERANCE)


def test_by_text_and_by_ids_are_the_same_score_with_one_vocabulary(own: RewardModel) -> None:
    by_text = own.score_text(PROMPTS, ANSWERS)
    assert by_text == pytest.approx(own.score_rows(rows_of(own.tokenizer)), abs=TOLERANCE)


def test_trap_09_a_cut_response_gets_no_eos_from_being_read_as_text(own: RewardModel) -> None:
    """Else it would be scored as if it had ended, by every reward model with a tokenizer of its own."""
    cut = [(prompt, response[:-1]) for prompt, response in rows_of(own.tokenizer)[:2]]
    by_text = own.score_text(PROMPTS[:2], ANSWERS[:2], truncated=[True, True])
    assert by_text == pytest.approx(own.score_rows(cut), abs=TOLERANCE)
    ended = own.score_text(PROMPTS[:2], ANSWERS[:2])
    assert min(abs(a - b) for a, b in zip(by_text, ended, strict=True)) > 0.01


def test_an_answer_that_the_tokenizer_draws_into_the_cue_is_read_apart_from_it(own: RewardModel) -> None:
    """`Bot:` and `:)` make `::`, one token across the border; that ended runs in the middle."""
    tokenizer = copy.deepcopy(own.tokenizer)
    tokenizer.add_tokens(["::"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'Bot:' + m.content + eos_token if m.role == 'assistant' else m.content + '\\n' }}"
        "{% endfor %}{{ 'Bot:' if add_generation_prompt }}"
    )
    model = RewardModel("merging", own.scalar, tokenizer, False, 150, 256)
    prompts = [[Message(role="user", content="Well?")]] * 2
    plain = tokenizer(":)", add_special_tokens=False)["input_ids"]
    expected = (
        [render_prompt(tokenizer, prompts[0])] * 2,
        [[*plain, tokenizer.eos_token_id], render_response(tokenizer, "No")],
    )
    assert model.score_text(prompts, [":)", "No"]) == pytest.approx(
        own.score_rows(list(zip(*expected, strict=True))), abs=TOLERANCE
    )


def test_a_reward_model_of_another_template_reads_text_whatever_its_vocabulary(
    lively_reward: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    other = load_tokenizer(lively_reward, "role-tags")
    export_scalar(scalar(lively_reward).model, other, tmp_path)
    model = load_reward_model(str(tmp_path), tiny_tokenizer, compute_of(FLOAT32), FLOAT32)
    assert same_vocabulary(model.tokenizer, tiny_tokenizer) and not model.reads_ids
    assert model.score_text(PROMPTS, ANSWERS) == pytest.approx(model.score_rows(rows_of(other)), abs=TOLERANCE)


def test_a_reward_model_without_a_template_is_given_one(
    lively_reward: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    export_scalar(scalar(lively_reward).model, load_tokenizer(lively_reward), tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(SetupError, match="it has no chat template"):
        load_reward_model(str(tmp_path), tiny_tokenizer, compute_of(FLOAT32), FLOAT32)
    given = FLOAT32.model_copy(update={"chat_template": "role-tags"})
    model = load_reward_model(str(tmp_path), tiny_tokenizer, compute_of(FLOAT32), given)
    assert not model.reads_ids and "Human: " in model.tokenizer.chat_template
    own = load_reward_model(lively_reward, tiny_tokenizer, compute_of(FLOAT32), given)
    assert "Human: " not in own.tokenizer.chat_template, "a template of its own stays"


def test_a_foreign_reward_model_reads_text_through_its_own_template(foreign: str, tiny_tokenizer: Any) -> None:
    model = load_reward_model(foreign, tiny_tokenizer, compute_of(FLOAT32), FLOAT32)
    assert not model.reads_ids and model.max_length == 128
    assert not same_vocabulary(model.tokenizer, tiny_tokenizer)
    found = model.score_text(PROMPTS, ANSWERS)
    assert max(found) - min(found) > 0.05
    for (prompt, answer), score in zip(DIALOGUES, found, strict=True):
        # The rendered dialogue as one text, straight through transformers.
        turns = [*prompt, Message(role="assistant", content=answer)]
        text = model.tokenizer.apply_chat_template(turns, tokenize=False)
        assert "Human: " in text and "Assistant:" in text and "<|im_start|>" not in text
        ids = torch.tensor([model.tokenizer(text, add_special_tokens=False)["input_ids"]])
        expected = plain_scores(foreign, ids, torch.ones_like(ids))
        assert score == pytest.approx(float(expected), abs=TOLERANCE)


def test_a_reward_model_of_the_same_vocabulary_reads_ids(lively_reward: str, tiny_tokenizer: Any) -> None:
    model = load_reward_model(lively_reward, tiny_tokenizer, compute_of(FLOAT32), FLOAT32)
    assert model.reads_ids and model.scalar.trained_parameters() == {}


def test_train_layers_split_only_models_that_read_ids(lively_reward: str, foreign: str, tiny_tokenizer: Any) -> None:
    split = FLOAT32.model_copy(update={"train_layers": 1})
    compute = compute_of(FLOAT32)
    assert load_reward_model(lively_reward, tiny_tokenizer, compute, split).scalar.train_layers == 1
    assert load_reward_model(foreign, tiny_tokenizer, compute, split).scalar.train_layers is None


def test_a_dialogue_too_long_for_the_reward_model_loses_its_oldest_turns(own: RewardModel) -> None:
    old = [Message(role="user", content="An old question."), Message(role="assistant", content="An old answer.")]
    new = [Message(role="user", content="A new question?")]
    whole = len(render_prompt(own.tokenizer, [*old, *new])) + len(render_response(own.tokenizer, "Yes."))
    for room, kept in ((whole, [*old, *new]), (whole - 1, new)):
        model = RewardModel("short", own.scalar, own.tokenizer, False, 150, room)
        expected = own.score_text([kept], ["Yes."])
        assert model.score_text([[*old, *new]], ["Yes."]) == pytest.approx(expected, abs=TOLERANCE)


def test_a_prompt_that_never_fits_is_cut_on_the_left_and_still_scored(own: RewardModel) -> None:
    short = RewardModel("short", own.scalar, own.tokenizer, False, 150, 40)
    prompt = [Message(role="user", content="word " * 60)]
    ids, answer = render_prompt(own.tokenizer, prompt), render_response(own.tokenizer, "Yes.")
    expected = own.score_rows([(ids[-(40 - len(answer)) :], answer)])
    assert short.score_text([prompt], ["Yes."]) == pytest.approx(expected, abs=TOLERANCE)
    assert len(short.score_text([prompt], ["so long an answer " * 30])) == 1


def test_scoring_leaves_no_gradient(own: RewardModel) -> None:
    own.scalar.requires_grad_(True)
    batch = token_batch(*zip(*rows_of(own.tokenizer), strict=True))
    assert not own.score_ids(batch).requires_grad


def test_the_tokenizer_of_an_exported_reward_model_is_still_the_policys(
    lively_reward: str, tiny_tokenizer: Any
) -> None:
    assert load_tokenizer(lively_reward).pad_token_id != tiny_tokenizer.pad_token_id
    assert same_vocabulary(load_tokenizer(lively_reward), tiny_tokenizer)

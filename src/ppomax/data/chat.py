"""Messages to token ids, through the model's own chat template and nothing else.

Template text is tokenised once and brings its own special tokens; no second set is added.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from jinja2.exceptions import TemplateError

from ppomax.errors import first_line
from ppomax.types import Dialogue, Message, SetupError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

# The newline stands before a turn, not after it, so that a dialogue ends exactly at its eos; prompts are the same ids.
CHATML = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
# A bos where the tokenizer has one of its own: models were trained with it at the start. No blank after the cue
# "Assistant:": the first token of an answer carries it, as in running text.
ROLE_TAGS = (
    "{% if bos_token and bos_token != eos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ ('Human: ' if message['role'] == 'user' else '') + message['content'] | trim }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
NAMED_TEMPLATES = {"chatml": CHATML, "role-tags": ROLE_TAGS}
# Two of Unicode's noncharacters, which no text may hold, and a special token's number between them.
_SPELLED = re.compile("\ufdd0(\\d+)\ufdd1")
# The day that templates are told it is, by which ids do not depend on when a stage runs or goes on: the one that Llama
# 3.2's template names where it is told none. A macro, since transformers takes no functions.
TODAY = date(2024, 7, 26)
_FORMATS = {f"%{letter}": TODAY.strftime(f"%{letter}") for letter in "aAbBcdHIjmMpSuUVwWxXyYF"}
_FORMATS["%-d"] = str(TODAY.day)
_FILLED = "".join(f" | replace({format!r}, {text!r})" for format, text in _FORMATS.items())
_CALENDAR = "{% macro strftime_now(format) %}{{ format" + _FILLED + " }}{% endmacro %}"
REFUSED = "refused by the chat template"


def chat_template(name_or_file: str) -> str:
    """The Jinja text of a built-in template (`chatml`, `role-tags`) or of a file."""
    if name_or_file in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        raise SetupError(
            f"chat template {name_or_file!r}: no such file. "
            f"Expected a file with a Jinja template, or one of: {', '.join(NAMED_TEMPLATES)}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SetupError(f"chat template {name_or_file}: not UTF-8 text ({error})") from error


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> PreTrainedTokenizerBase:
    """Give the tokenizer the template that training needs, in place, and check it on a small dialogue.

    `template` (a name or a file) replaces the tokenizer's own. A ChatML template that invents a system prompt where
    the data has none is replaced by plain ChatML; any other is left as it is.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise SetupError(f"tokenizer {name}: it has no eos token, so nothing can end a response; set its eos_token")
    if template is not None:
        tokenizer.chat_template = chat_template(template)
    if isinstance(tokenizer.chat_template, dict):  # several by name: what apply_chat_template takes of them
        if "default" not in tokenizer.chat_template:
            found = ", ".join(tokenizer.chat_template)
            raise SetupError(f"tokenizer {name}: found chat templates {found}, expected one named default")
        tokenizer.chat_template = tokenizer.chat_template["default"]
    if not tokenizer.chat_template:
        raise SetupError(
            f"tokenizer {name}: it has no chat template. Give one with --compute.chat-template FILE, "
            f"or a built-in one by name: {', '.join(NAMED_TEMPLATES)}"
        )
    question = Message(role="user", content="Hello?")
    if template is None and "<|im_start|>system\n" in _template_text(tokenizer, [question]):
        tokenizer.chat_template = CHATML
    turns = (question, Message(role="assistant", content="Hello.")) * 2
    render_dialogue(tokenizer, Dialogue(turns, key=""), max_length=1_000_000)
    return tokenizer


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a prompt, ending with the template's cue for an assistant turn."""
    return _template_ids(tokenizer, messages, cue=True)


def render_response(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of an answer, its eos included: what the template puts after the ids of a prompt."""
    turns = [Message(role="user", content="Hello?"), Message(role="assistant", content=text)]
    ids, start = _whole_or_apart(lambda apart: _turn_ids(tokenizer, turns, apart=apart))
    return ids[start:]


def render_dialogue(
    tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, max_length: int
) -> tuple[list[int], list[bool]]:
    """Token ids of a dialogue and its loss mask, both cut on the right at `max_length`.

    The mask is True on the tokens of every assistant turn that is learnt, its eos included, and False on all else; the
    ids end at the eos of the last assistant turn. Plain text is tokenised as the tokenizer does it; all of it counts.
    A mask without True (the first answer begins after the cut) means that there is nothing to learn.
    """
    if dialogue.text is not None:
        ids = list(tokenizer(dialogue.text, split_special_tokens=True)["input_ids"])[:max_length]
        return ids, [True] * len(ids)
    ids, mask = _whole_or_apart(lambda apart: _masked_ids(tokenizer, dialogue.messages, max_length, apart=apart))
    return ids[:max_length], mask[:max_length]


def refusal(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], learnt: Sequence[int] = ()) -> str | None:
    """Why no ids, or no loss mask, can be made of a dialogue or a prompt, in a few words; None where they can.

    learnt: the places of answers in `messages`. Text is compared, not ids, which would take as long as to make them.
    """
    eos = str(tokenizer.eos_token)
    try:
        whole = _rendered(tokenizer, messages, cue=messages[-1]["role"] != "assistant")
        for i in learnt:
            answered = _rendered(tokenizer, messages[: i + 1]) if i + 1 < len(messages) else whole
            answered = answered[: answered.rfind(eos) + len(eos)]
            asked = _rendered(tokenizer, messages[:i], cue=True)
            if not (whole.startswith(answered) and answered.startswith(asked) and len(answered) > len(asked)):
                return f"{REFUSED}: it writes turns in another way when others follow"
    except TemplateError as error:
        return f"{REFUSED}: {first_line(error)}"
    return None


def _masked_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int, *, apart: bool
) -> tuple[list[int], list[bool]]:
    """Ids up to the last answer's eos, and their loss mask, of which nothing after `max_length` need be right."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("render_dialogue: found no assistant turn, expected at least one")
    ids, start = _turn_ids(tokenizer, messages[: answers[-1] + 1], apart=apart)
    mask = [False] * start + [messages[answers[-1]].get("learnt", True)] * (len(ids) - start)
    for i in answers[:-1]:
        if not messages[i].get("learnt", True):
            continue
        earlier, start = _turn_ids(tokenizer, messages[: i + 1], apart=apart)
        _expect_prefix(ids, earlier, tokenizer)
        if start >= max_length:
            break
        mask[start : len(earlier)] = [True] * (len(earlier) - start)
    return ids, mask


def fit_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_tokens: int
) -> tuple[Message, ...] | None:
    """The newest part of a prompt that renders to at most `max_tokens` ids; None where no part does.

    Whole exchanges are dropped, oldest first, so that what is left starts with a user turn; a system message and the
    last user turn are never dropped.
    """
    parts = _newest_parts(messages)
    first = _first_that_fits(parts, lambda part: len(render_prompt(tokenizer, part)) <= max_tokens)
    return parts[first] if first < len(parts) else None


def fit_dialogue(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, max_tokens: int) -> Dialogue:
    """The dialogue without as many of its oldest exchanges as it takes to render to at most `max_tokens` ids.

    The system message and the last exchange always stay, even where they alone are too long.
    """
    parts = _newest_parts(dialogue.messages)

    def fits(part: tuple[Message, ...]) -> bool:
        return len(_whole_or_apart(lambda apart: _turn_ids(tokenizer, part, apart=apart))[0]) <= max_tokens

    first = _first_that_fits(parts, fits)
    return replace(dialogue, messages=parts[min(first, len(parts) - 1)])


def _newest_parts(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """The whole, then without its oldest exchange, and so on; all begin with the system message, if there is one."""
    system = tuple(messages[:1]) if messages and messages[0]["role"] == "system" else ()
    turns = tuple(messages[len(system) :])
    return [system + turns[i:] for i in range(len(turns)) if i == 0 or turns[i]["role"] == "user"]


def _first_that_fits(parts: Sequence[tuple[Message, ...]], fits: Callable[[tuple[Message, ...]], bool]) -> int:
    """The index of the longest part that fits (fewer turns are fewer tokens); most dialogues fit whole."""
    if not parts or fits(parts[0]):
        return 0
    return bisect_left(parts, True, lo=1, key=fits)


class _PrefixError(SetupError):
    """The ids of a dialogue do not begin with those of its own prefix."""


def _whole_or_apart(render: Callable[[bool], T]) -> T:
    """What `render` makes of a text tokenised whole, or, where the tokenizer joins the first characters of an answer
    with the cue before it (two newlines), of one tokenised in parts: as the answer to a prompt's ids is sampled."""
    try:
        return render(False)
    except _PrefixError:
        return render(True)


def _turn_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, apart: bool) -> tuple[list[int], int]:
    """Ids up to the eos of the last message, an assistant turn, and where that turn begins.

    What the template puts after the eos is dropped. apart: every answer is tokenised apart from what is before it.
    """
    ids = _template_ids(tokenizer, messages, cue=False, apart=apart)
    prompt = _template_ids(tokenizer, messages[:-1], cue=True, apart=apart)
    _expect_prefix(ids, prompt, tokenizer)
    end = len(ids)
    while end > len(prompt) and ids[end - 1] != tokenizer.eos_token_id:
        end -= 1
    if end == len(prompt):
        raise SetupError(
            f"chat template of {tokenizer.name_or_path or 'the tokenizer'}: it does not end an assistant turn with the "
            f"eos token {tokenizer.eos_token!r}, so the model would never learn to stop. "
            "Set the tokenizer's eos_token to the template's end of turn, or give another --compute.chat-template"
        )
    return ids[:end], len(prompt)


def _expect_prefix(ids: list[int], prefix: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    if ids[: len(prefix)] != prefix:
        at = next((i for i, (a, b) in enumerate(zip(ids, prefix, strict=False)) if a != b), min(len(ids), len(prefix)))
        raise _PrefixError(
            f"chat template of {tokenizer.name_or_path or 'the tokenizer'}: a dialogue does not start with the ids of "
            f"its own prefix (they part at token {at}: prefix {tokenizer.decode(prefix[at : at + 5])!r}, dialogue "
            f"{tokenizer.decode(ids[at : at + 5])!r}), so a loss mask cannot be made. "
            "Give another --compute.chat-template"
        )


def _template_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, cue: bool, apart: bool = False
) -> list[int]:
    """Ids of a rendered dialogue. A content that spells a special token gets the ids of its letters: data cannot end a
    turn, nor begin one."""
    special = sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special})
    spelled = [(f"\ufdd0{i}\ufdd1", token) for i, token in enumerate(special)]
    plain = [_SPELLED.sub("\ufffd\\1\ufffd", m["content"]) for m in messages]  # what reads as our own marks is none
    marked = [Message(role=m["role"], content=_replaced(x, spelled)) for m, x in zip(messages, plain, strict=True)]
    whole = _template_text(tokenizer, marked, cue=cue)
    for i in reversed([i for i, m in enumerate(marked) if apart and m["role"] == "assistant"]):
        asked = _template_text(tokenizer, marked[:i], cue=True)
        if whole.startswith(asked):
            whole = f"{asked}\ufdd0{len(special)}\ufdd1{whole[len(asked) :]}"  # an empty token, which is no ids
    # Text and the numbers of spelt-out tokens in turns.
    ids: list[int] = []
    for i, piece in enumerate(_SPELLED.split(whole)):
        text = piece if i % 2 == 0 else [*special, ""][int(piece)]
        # Special tokens are written by the template itself: adding the tokenizer's own would double the bos.
        ids += tokenizer(text, add_special_tokens=False, split_special_tokens=i % 2 == 1)["input_ids"]
    return ids


def _replaced(text: str, replacements: Sequence[tuple[str, str]]) -> str:
    for new, old in replacements:
        text = text.replace(old, new)
    return text


def _template_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, cue: bool = False) -> str:
    try:
        return _rendered(tokenizer, messages, cue=cue)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise SetupError(
            f"chat template of {tokenizer.name_or_path or 'the tokenizer'}: it refuses a dialogue with the roles "
            f"{roles}: {error}. Change the data, or give another --compute.chat-template"
        ) from error


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, cue: bool = False) -> str:
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    template = tokenizer.chat_template
    dated = _CALENDAR + template if isinstance(template, str) and "strftime_now" in template else None
    return str(tokenizer.apply_chat_template(turns, chat_template=dated, tokenize=False, add_generation_prompt=cue))

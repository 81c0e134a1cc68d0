"""What a row means: its keys choose the schema, and the schema gives messages.

Text formats (HH-RLHF, Alpaca, plain strings) are stripped; message lists are taken as they are written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppomax.data.files import Row
from ppomax.types import DataError, Message

ROLES = ("system", "user", "assistant")
PAIR_SCHEMAS = (
    "`chosen` and `rejected` as HH-RLHF text (\\n\\nHuman: ... \\n\\nAssistant: ...)",
    "`prompt`, `chosen`, `rejected` (strings or message lists)",
    "`chosen` and `rejected` as message lists with the prompt inside",
    "`prompt`, `responses` (a list) and `ranks` (1 is best) or `scores` (higher is better)",
)
PROMPT_SCHEMAS = ("`prompt`", "`messages`", "`instruction` (+ `input`)", "`chosen` and `rejected`")
DIALOGUE_SCHEMAS = (
    "`messages`",
    "`prompt` with `completion` or `response`",
    "`instruction`, `input`, `output`",
    "`chosen` and `rejected` (the chosen side is learnt)",
    "`text`",
)
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}

Messages = tuple[Message, ...]


class Unusable(Exception):
    """A well-formed row that cannot be learnt from: it is dropped and counted under the reason it carries."""


@dataclass(frozen=True)
class Preference:
    """Both sides of a pair after their common prompt; `notes` names what had to be changed to get there."""

    prompt: Messages
    chosen: str
    rejected: str
    notes: tuple[str, ...] = ()


def present(row: Row) -> dict[str, Any]:
    """The fields that hold something: tables fill the columns that a row lacks with null."""
    fields = {key: value for key, value in row.fields.items() if value is not None}
    instances = fields.get("instances")
    if "instruction" in fields and isinstance(instances, list) and instances and isinstance(instances[0], Mapping):
        # Self-Instruct seed tasks nest Alpaca's `input` and `output`.
        fields = {**fields, **instances[0]}
    return fields


def schema_of(fields: Mapping[str, Any]) -> str:
    """What a row is made of, for a report of files that mix several; by the names that decide how it is read."""
    for names in (("chosen", "rejected"), ("responses",), ("messages",), ("instruction",), ("prompt",), ("text",)):
        if all(fields.get(name) is not None for name in names):  # tables fill what a row lacks with null
            kind = " as messages" if isinstance(fields[names[0]], list) and names[0] in ("chosen", "prompt") else ""
            return " and ".join(f"`{name}`" for name in names) + kind
    return "other fields"


def is_pair(fields: Mapping[str, Any]) -> bool:
    """Whether the row holds a preference."""
    return "chosen" in fields and "rejected" in fields


def preference_of(fields: Mapping[str, Any], place: str) -> Preference:
    """The pair in a row with `chosen` and `rejected`, whichever of the three pair schemas it follows."""
    sides = [_side(fields, name, place) for name in ("chosen", "rejected")]
    return _split_pair(*sides)


def score_gap(fields: Mapping[str, Any], place: str) -> float | None:
    """`score_chosen` − `score_rejected`, None without both; a row whose scores are equal or say the opposite is
    unusable."""
    if "score_chosen" not in fields or "score_rejected" not in fields:
        return None
    scores = []
    for name in ("score_chosen", "score_rejected"):
        scores.append(_finite(fields[name], f"{place}, `{name}`"))
    if scores[0] < scores[1]:
        raise Unusable("score_chosen less than score_rejected")
    if scores[0] == scores[1]:
        raise Unusable("score_chosen equal to score_rejected")
    return scores[0] - scores[1]


def is_ranking(fields: Mapping[str, Any]) -> bool:
    """Whether the row ranks several responses to one prompt."""
    return "responses" in fields and ("ranks" in fields or "scores" in fields)


def ranking_of(
    fields: Mapping[str, Any], place: str
) -> tuple[Messages, list[tuple[str, str, float | None]], tuple[str, ...]]:
    """The prompt of a ranking, its pairs (better, worse, score gap; None for ranks) and notes.

    Equal ranks make no pair, and empty responses are left out; both are noted.
    """
    if "prompt" not in fields:
        raise DataError(f"{place}: found `responses` without `prompt`, expected both")
    by = "scores" if "scores" in fields else "ranks"
    responses, values = fields["responses"], fields[by]
    for name, value in (("responses", responses), (by, values)):
        if not isinstance(value, list):
            raise DataError(f"{place}, `{name}`: found {type(value).__name__}, expected a list")
    if len(responses) != len(values):
        raise DataError(f"{place}: found {len(responses)} `responses` and {len(values)} `{by}`, expected as many")
    texts = [_text(text, f"{place}, `responses`[{i}]").strip() for i, text in enumerate(responses)]
    sign = 1 if by == "scores" else -1
    goodness = [sign * _finite(value, f"{place}, `{by}`[{i}]") for i, value in enumerate(values)]
    check_text(*texts)
    order = sorted((i for i, text in enumerate(texts) if text), key=lambda i: -goodness[i])
    if len(order) < 2 and not all(texts):
        raise Unusable("empty response")
    notes = () if all(texts) else ("empty response left out of its ranking",)
    if len({goodness[i] for i in order}) < len(order):
        notes += ("tie in a ranking, which makes no pair",)
    pairs = [
        (texts[a], texts[b], goodness[a] - goodness[b] if by == "scores" else None)
        for at, a in enumerate(order)
        for b in order[at + 1 :]
        if goodness[a] > goodness[b] and texts[a] != texts[b]
    ]
    if not pairs:
        raise Unusable("no response is ranked above another")
    return _turns(fields["prompt"], "user", f"{place}, `prompt`"), pairs, notes


def dialogue_of(fields: Mapping[str, Any], place: str) -> Messages | None:
    """The messages of a row that holds a dialogue, answers included; None where no dialogue schema fits."""
    if "messages" in fields:
        return _message_list(fields["messages"], f"{place}, `messages`")
    answer = next((name for name in ("completion", "response") if name in fields), None)
    if "prompt" in fields and answer:
        prompt = _turns(fields["prompt"], "user", f"{place}, `prompt`")
        return prompt + _answer(fields[answer], fields["prompt"], f"{place}, `{answer}`")
    if "instruction" in fields and "output" in fields:
        return _instruction(fields, place) + _answer(fields["output"], fields["instruction"], f"{place}, `output`")
    if is_pair(fields):
        pair = preference_of(fields, place)
        return (*pair.prompt, Message(role="assistant", content=pair.chosen))
    return None


def prompt_of(fields: Mapping[str, Any], place: str) -> tuple[Messages, frozenset[str], tuple[str, ...]] | None:
    """The prompt of a row, the fields that it was made of, and notes; None where no schema fits."""
    if is_pair(fields):
        pair = preference_of(fields, place)
        return pair.prompt, frozenset(("prompt", "chosen", "rejected")), pair.notes
    if "messages" in fields:
        messages = _message_list(fields["messages"], f"{place}, `messages`")
        return _before_last_answer(messages), frozenset(["messages"]), ()
    if "prompt" in fields:
        return _turns(fields["prompt"], "user", f"{place}, `prompt`"), frozenset(["prompt"]), ()
    if "instruction" in fields:
        return _instruction(fields, place), frozenset(["instruction", "input"]), ()
    return None


def _before_last_answer(messages: Messages) -> Messages:
    """Everything before the last assistant turn; all of it where the last turn is the user's."""
    if messages and messages[-1]["role"] == "user":
        return messages
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[-1]] if answers else messages


def missing_field(row: Row, schemas: Sequence[str]) -> DataError:
    """The error for a row that follows none of the schemas that its reader accepts."""
    found = ", ".join(key if value is not None else f"{key} (null)" for key, value in row.fields.items()) or "none"
    expected = "; ".join(schemas)
    return DataError(f"{row.place}: a needed field is missing. Found keys: {found}. Expected one of: {expected}")


def check_prompt(messages: Messages) -> None:
    """Raise Unusable unless the prompt ends with a user turn and no turn of it is empty."""
    if not any(message["role"] == "user" for message in messages) or not messages[-1]["content"].strip():
        raise Unusable("empty prompt")
    if messages[-1]["role"] != "user":
        raise Unusable("prompt does not end with a user turn")
    if any(not message["content"].strip() for message in messages):
        raise Unusable("empty turn in the prompt")
    check_text(*(message["content"] for message in messages))


def check_text(*texts: str) -> None:
    """Raise Unusable where a text holds half of a surrogate pair, which no tokenizer can encode."""
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError:
        raise Unusable("unpaired surrogate in the text") from None


def _side(fields: Mapping[str, Any], name: str, place: str) -> Messages:
    value = fields[name]
    where = f"{place}, `{name}`"
    messages = _turns(value, "assistant", where)
    whole = any(m["role"] != "assistant" for m in messages[: None if isinstance(value, list) else 1])
    if "prompt" not in fields:
        if whole:
            return messages
        raise DataError(
            f"{where}: no prompt found. Found keys: {', '.join(fields)}. Expected one of: {'; '.join(PAIR_SCHEMAS)}"
        )
    prompt = _turns(fields["prompt"], "user", f"{place}, `prompt`")
    if whole and (isinstance(value, list) or _begins(messages, prompt)):
        return messages
    return prompt + _answer(value, fields["prompt"], where)


def _begins(messages: Messages, prompt: Messages) -> bool:
    """Whether a dialogue begins with a prompt."""
    return len(messages) >= len(prompt) and all(map(_equal, messages, prompt))


def _split_pair(chosen: Messages, rejected: Messages) -> Preference:
    """Split two dialogues after their last common user turn; each side's next assistant turn answers it."""
    same = 0
    while same < min(len(chosen), len(rejected)) and _equal(chosen[same], rejected[same]):
        same += 1
    users = [i for i in range(same) if chosen[i]["role"] == "user"]
    if not users:
        raise Unusable("no common prompt")
    cut = users[-1] + 1
    answers = []
    for side in (chosen, rejected):
        answered = len(side) > cut and side[cut]["role"] == "assistant"
        answers.append(side[cut]["content"] if answered else "")
    notes = ["diverged earlier"] if max(len(chosen), len(rejected)) > cut + 1 else []
    context = _merge_turns(chosen[:cut])
    if len(context) < cut:
        notes.append("consecutive turns of one role merged")
    return Preference(context, answers[0], answers[1], tuple(notes))


def _equal(a: Message, b: Message) -> bool:
    return a["role"] == b["role"] and a["content"].strip() == b["content"].strip()


def _merge_turns(messages: Messages) -> Messages:
    """Join neighbouring turns of one role: HH-RLHF has some, and many chat templates refuse them."""
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            content = f"{merged[-1]['content']}\n\n{message['content']}"
            merged[-1] = Message(role=message["role"], content=content)
        else:
            merged.append(message)
    return tuple(merged)


def _instruction(fields: Mapping[str, Any], place: str) -> Messages:
    parts = [_text(fields.get(name, ""), f"{place}, `{name}`").strip() for name in ("instruction", "input")]
    return (Message(role="user", content="\n\n".join(part for part in parts if part)),)


def _turns(value: Any, role: str, where: str) -> Messages:
    """A message list, HH-RLHF text, or plain text as one turn of `role`."""
    if isinstance(value, list):
        return _message_list(value, where)
    text = _text(value, where)
    if not _is_tagged(text):
        return (Message(role=role, content=text.strip()),)
    pieces = _TURN.split(text)
    turns = [
        Message(role=_HH_ROLES[name], content=content.strip())
        for name, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if role == "user" and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()  # Prompts in this format often end with the cue "Assistant:".
    return tuple(turns)


def _is_tagged(text: str) -> bool:
    """Whether a text is HH-RLHF's: it begins with "Human:" or "Assistant:"."""
    first, *others = _TURN.split(text)
    return bool(others) and not first.strip()


def _answer(value: Any, prompt: Any, where: str) -> Messages:
    """What follows a prompt of its own: a string is one answer, however it begins. Only beside a prompt in HH-RLHF's
    format is "Assistant:" before it, and are turns after it, of that format too."""
    turns = _turns(value, "assistant", where)
    if isinstance(value, str) and (turns[0]["role"] == "user" or not (isinstance(prompt, str) and _is_tagged(prompt))):
        return (Message(role="assistant", content=value.strip()),)
    return turns


def _message_list(value: Any, where: str) -> Messages:
    if not isinstance(value, list):
        raise DataError(f"{where}: found {type(value).__name__}, expected a list of {{role, content}} messages")
    messages = []
    for i, item in enumerate(value):
        if isinstance(item, Mapping) and (item.get("role") in ("tool", "function") or item.get("tool_calls")):
            raise Unusable("a turn of a tool, or one that calls one")
        if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
            found = ", ".join(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
            raise DataError(f"{where}[{i}]: found {found or 'no keys'}, expected an object with `role` and `content`")
        role = "system" if item["role"] == "developer" else item["role"]
        if role not in ROLES:
            raise DataError(f"{where}[{i}].role: found {item['role']!r}, expected one of {', '.join(ROLES)}")
        message = Message(role=role, content=_content(item["content"], f"{where}[{i}].content"))
        if role == "assistant" and item.get("weight") == 0:  # OpenAI's mark
            message["learnt"] = False
        messages.append(message)
    return tuple(m for m in messages if m["role"] != "system" or m["content"].strip())


def _content(value: Any, where: str) -> str:
    """A text, or a list of text parts as OpenAI writes it."""
    if not isinstance(value, list):
        return _text(value, where)
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            found = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"{where}[{i}]: found a part of type {found!r}, expected text only")
        texts.append(_text(part.get("text"), f"{where}[{i}].text"))
    return "".join(texts)


def _finite(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"{where}: found {repr(value)[:40]}, expected a finite number")
    return number


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: found {type(value).__name__}, expected a string")
    return value

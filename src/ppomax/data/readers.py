"""Rows in, prompts, dialogues and preference pairs out, with a report of what was dropped and why."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ppomax.data import schemas
from ppomax.data.chat import REFUSED, refusal
from ppomax.data.files import Row, check_spec, iter_rows
from ppomax.types import DataError, Dialogue, Message, Pair, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass(frozen=True)
class ReadReport:
    """How many rows were read and kept. `dropped` and `noted` (kept, but changed) count rows by reason.

    `first` gives `file:line` of the first row for every reason.
    """

    read: int
    kept: int
    dropped: Mapping[str, int]
    noted: Mapping[str, int]
    first: Mapping[str, str]

    def __str__(self) -> str:
        def listing(counts: Mapping[str, int]) -> str:
            return ", ".join(f"{count} {reason} (first {self.first[reason]})" for reason, count in counts.items())

        parts = [f"read {self.read} rows, kept {self.kept}"]
        if self.dropped:
            parts.append(f"dropped {listing(self.dropped)}")
        if self.noted:
            parts.append(f"noted {listing(self.noted)}")
        return "; ".join(parts)


def prompt_key(messages: Sequence[Message]) -> str:
    """16 hex digits that identify a prompt by its roles and stripped contents, wherever it stands."""
    return _digest([[message["role"], message["content"].strip()] for message in messages])


def read_prompts(
    specs: str | Sequence[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[list[Prompt], ReadReport]:
    """Read prompts from any schema; a dialogue gives what comes before its last answer, a pair its prompt.

    Columns that do not make the prompt are kept in `Prompt.columns`, for rewards that need them. tokenizer: rows that
    its chat template refuses are dropped and counted, as in the other readers.
    """

    def convert(row: Row) -> tuple[list[Prompt], tuple[str, ...]]:
        found = schemas.prompt_of(schemas.present(row), row.place)
        if found is None:
            raise schemas.missing_field(row, schemas.PROMPT_SCHEMAS)
        messages, used, notes = found
        schemas.check_prompt(messages)
        _expect_renders(tokenizer, messages)
        columns = {key: value for key, value in row.fields.items() if key not in used and key != "source"}
        if row.source or row.fields.get("source"):
            columns["source"] = _source(row)
        return [Prompt(messages, prompt_key(messages), _source(row), columns, row.weight)], notes

    return _read(specs, convert)


def read_dialogues(
    specs: str | Sequence[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[list[Dialogue], ReadReport]:
    """Read dialogues whose assistant turns are to be learnt, or plain `text`; of a pair, the chosen side."""

    def convert(row: Row) -> tuple[list[Dialogue], tuple[str, ...]]:
        fields = schemas.present(row)
        messages = schemas.dialogue_of(fields, row.place)
        if messages is None:
            return [_plain_text(row)], ()
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise schemas.Unusable("no assistant turn")
        answers = [i for i in answers if messages[i].get("learnt", True)]
        if not answers:
            raise schemas.Unusable("every assistant turn has weight 0")
        if any(not messages[i]["content"].strip() for i in answers):
            raise schemas.Unusable("empty response")
        messages, notes = messages[: answers[-1] + 1], ()
        if answers[0] == 0 and len(answers) > 1:  # a greeting, which nothing asks for
            opening = Message(role="assistant", content=messages[0]["content"], learnt=False)
            messages, notes, answers = (opening, *messages[1:]), ("opening answer not learnt",), answers[1:]
        schemas.check_prompt(messages[:-1])
        schemas.check_text(messages[-1]["content"])
        _expect_renders(tokenizer, messages, answers)
        return [Dialogue(messages, prompt_key(messages[:-1]), _source(row), weight=row.weight)], notes

    return _read(specs, convert)


def read_pairs(
    specs: str | Sequence[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[list[Pair], ReadReport]:
    """Read preference pairs: HH-RLHF text, `chosen` and `rejected` with or without a `prompt` of their own, or a
    ranking of several responses, which becomes all its pairs (InstructGPT)."""

    def convert(row: Row) -> tuple[list[Pair], tuple[str, ...]]:
        fields = schemas.present(row)
        if schemas.is_ranking(fields):
            return ranked(row, fields)
        if not schemas.is_pair(fields):
            raise schemas.missing_field(row, schemas.PAIR_SCHEMAS)
        pair = schemas.preference_of(fields, row.place)
        schemas.check_prompt(pair.prompt)
        for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if not text.strip():
                raise schemas.Unusable(f"empty {name}")
        if pair.chosen.strip() == pair.rejected.strip():
            raise schemas.Unusable("chosen == rejected")
        schemas.check_text(pair.chosen, pair.rejected)
        _expect_answers_render(tokenizer, pair.prompt, (pair.chosen, pair.rejected))
        key, gap = prompt_key(pair.prompt), schemas.score_gap(fields, row.place)
        return [Pair(pair.prompt, pair.chosen, pair.rejected, key, _source(row), gap, row.weight)], pair.notes

    def ranked(row: Row, fields: Mapping[str, Any]) -> tuple[list[Pair], tuple[str, ...]]:
        prompt, pairs, notes = schemas.ranking_of(fields, row.place)
        schemas.check_prompt(prompt)
        _expect_answers_render(tokenizer, prompt, dict.fromkeys(text for pair in pairs for text in pair[:2]))
        key = prompt_key(prompt)
        return [Pair(prompt, better, worse, key, _source(row), gap, row.weight) for better, worse, gap in pairs], notes

    return _read(specs, convert)


def _read(
    specs: str | Sequence[str], convert: Callable[[Row], tuple[list[T], tuple[str, ...]]]
) -> tuple[list[T], ReadReport]:
    specs = [specs] if isinstance(specs, str) else list(specs)
    for spec in specs:
        check_spec(spec)
    kept: list[T] = []
    read = used = 0
    dropped: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    first: dict[str, str] = {}
    for spec in specs:
        usual = None
        for row in iter_rows(spec):
            read += 1
            schema = schemas.schema_of(row.fields)
            usual = usual or schema
            try:
                values, notes = convert(row)
            except schemas.Unusable as reason:
                dropped[str(reason)] += 1
                first.setdefault(str(reason), row.place)
                continue
            used += 1
            kept += values
            for note in notes if schema == usual else (*notes, f"with {schema} in a file that begins with {usual}"):
                noted[note] += 1
                first.setdefault(note, row.place)
    report = ReadReport(read, used, dict(dropped), dict(noted), first)
    if not kept:
        refused = any(reason.startswith(REFUSED) for reason in dropped)
        advice = "; change the data, or give another --compute.chat-template" if refused else ""
        raise DataError(f"{', '.join(specs) or 'no data given'}: no usable row is left: {report}{advice}")
    return kept, report


def _expect_renders(
    tokenizer: PreTrainedTokenizerBase | None, messages: Sequence[Message], learnt: Sequence[int] = ()
) -> None:
    """Raise Unusable where a chat template makes nothing of a dialogue or a prompt that could be learnt from."""
    if tokenizer is not None and (reason := refusal(tokenizer, messages, learnt)):
        raise schemas.Unusable(reason)


def _expect_answers_render(
    tokenizer: PreTrainedTokenizerBase | None, prompt: Sequence[Message], answers: Iterable[str]
) -> None:
    for text in answers:
        _expect_renders(tokenizer, [*prompt, Message(role="assistant", content=text)], [len(prompt)])


def _plain_text(row: Row) -> Dialogue:
    text = row.fields.get("text")
    if text is None:
        raise schemas.missing_field(row, schemas.DIALOGUE_SCHEMAS)
    if not isinstance(text, str):
        raise DataError(f"{row.place}, `text`: found {type(text).__name__}, expected a string")
    if not text.strip():
        raise schemas.Unusable("empty text")
    schemas.check_text(text)
    return Dialogue((), _digest(text.strip()), _source(row), text, row.weight)


def _source(row: Row) -> str:
    # The label of the spec wins: it is what the user typed for this run.
    label = row.source or str(row.fields.get("source") or row.fields.get("subset") or "default")
    return label.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair can be read, but not printed


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode("ascii")).hexdigest()[:16]

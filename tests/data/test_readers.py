from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from ppomax.data.chat import CHATML, render_dialogue
from ppomax.data.readers import prompt_key, read_dialogues, read_pairs, read_prompts
from ppomax.types import DataError

SHARED = Path(__file__).parents[2] / "../shared/data"
HH = SHARED / "hh-harmless-dev.jsonl.gz"
ALPACA = SHARED / "alpaca-seed-tasks.jsonl"


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


GOOD_PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "same ", "rejected": "same"}, "chosen == rejected"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "no common prompt"),
        ({"prompt": "q", "chosen": " ", "rejected": "b"}, "empty chosen"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty rejected"),
        ({"prompt": "q", "chosen": "a\ud83d", "rejected": "b"}, "unpaired surrogate in the text"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2},
            "score_chosen less than score_rejected",
        ),
        ({"chosen": "\n\nHuman: q\n\nAssistant: ", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "empty chosen"),
        ({"chosen": "\n\nHuman: \n\nAssistant: a", "rejected": "\n\nHuman: \n\nAssistant: b"}, "empty prompt"),
    ],
)
def test_pairs_dropped_and_counted(write: Callable[..., Path], row: dict, reason: str) -> None:
    path = str(write(GOOD_PAIR, row, GOOD_PAIR, row))
    pairs, report = read_pairs(path)
    assert len(pairs) == 2
    assert (report.read, report.kept, report.dropped, report.first) == (4, 2, {reason: 2}, {reason: f"{path}:2"})
    assert str(report) == f"read 4 rows, kept 2; dropped 2 {reason} (first {path}:2)"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "response": " "}, "empty response"),
        ({"messages": messages(("user", "q"), ("assistant", ""), ("user", "r"), ("assistant", "b"))}, "empty response"),
        ({"messages": messages(("system", "Be kind."))}, "no assistant turn"),
        ({"messages": messages(("user", "q"))}, "no assistant turn"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": messages(("assistant", "a"))}, "empty prompt"),
        ({"instruction": "", "output": "a"}, "empty prompt"),
        ({"text": "\n"}, "empty text"),
    ],
)
def test_dialogues_dropped_and_counted(write: Callable[..., Path], row: dict, reason: str) -> None:
    rows, report = read_dialogues(str(write({"text": "fine"}, row)))
    assert (len(rows), report.dropped) == (1, {reason: 1})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": ""}, "empty prompt"),
        ({"messages": messages(("system", "Be kind."))}, "empty prompt"),
        ({"messages": messages(("user", "q"), ("assistant", "a"), ("user", ""))}, "empty prompt"),
        ({"messages": messages(("user", ""), ("assistant", "a"), ("user", "q"))}, "empty turn in the prompt"),
        (
            {"messages": messages(("user", "q"), ("assistant", "a"), ("assistant", "b"))},
            "prompt does not end with a user turn",
        ),
    ],
)
def test_prompts_dropped_and_counted(write: Callable[..., Path], row: dict, reason: str) -> None:
    rows, report = read_prompts(str(write({"prompt": "q"}, row)))
    assert (len(rows), report.dropped) == (1, {reason: 1})


def test_a_row_without_the_needed_field_names_line_keys_and_schemas(write: Callable[..., Path]) -> None:
    path = write({"prompt": "q", "response": "a"}, {"question": "q", "answer": "a", "prompt": None})
    found = rf"{path}:2: a needed field is missing\. Found keys: question, answer, prompt \(null\)\. Expected one of: "
    with pytest.raises(DataError, match=found + "`prompt`; `messages`; `instruction`"):
        read_prompts(str(path))
    with pytest.raises(DataError, match=found + "`messages`; `prompt` with `completion`"):
        read_dialogues(str(path))
    with pytest.raises(
        DataError, match=r":1: .*Found keys: prompt, response\. Expected one of: `chosen` and `rejected` as HH"
    ):
        read_pairs(str(path))


def test_nothing_left_is_an_error_with_the_counts(write: Callable[..., Path]) -> None:
    path = write({"prompt": ""}, {"prompt": " "})
    with pytest.raises(DataError) as error:
        read_prompts(str(path))
    assert str(error.value) == (
        f"{path}: no usable row is left: read 2 rows, kept 0; dropped 2 empty prompt (first {path}:1)"
    )
    with pytest.raises(DataError, match=r"empty\.jsonl: no usable row is left: read 0 rows"):
        read_prompts(str(write(name="empty.jsonl")))


def test_every_spec_is_checked_before_the_first_is_read(write: Callable[..., Path]) -> None:
    broken = write("{")
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        read_prompts([str(broken), "nowhere.jsonl"])


def test_sources_and_columns(write: Callable[..., Path]) -> None:
    path = write({"prompt": "q", "source": "web", "answer": 4, "note": None}, {"prompt": "r"})
    rows, _ = read_prompts([str(path), f"{path}#source=mine"])
    assert [row.source for row in rows] == ["web", "default", "mine", "mine"]
    assert rows[0].columns == {"answer": 4, "note": None, "source": "web"} and rows[1].columns == {}
    assert [row.columns["source"] for row in rows[2:]] == ["mine", "mine"]
    pair = write({**GOOD_PAIR, "source": "web"}, name="pairs.jsonl")
    assert [read(str(pair))[0][0].source for read in (read_pairs, read_dialogues, read_prompts)] == ["web"] * 3


def test_key_is_the_hash_of_roles_and_stripped_contents(write: Callable[..., Path]) -> None:
    expected = hashlib.sha256(b'[["user", "caf\\u00e9"]]').hexdigest()[:16]
    assert prompt_key(({"role": "user", "content": " café\n"},)) == expected
    rows, _ = read_prompts(
        str(write({"prompt": "café"}, {"messages": messages(("user", "café "), ("assistant", "a"))}))
    )
    assert [row.key for row in rows] == [expected, expected]
    assert prompt_key(({"role": "system", "content": "café"},)) != expected


def test_hh_rlhf() -> None:
    if not HH.exists():
        pytest.skip("the HH-RLHF sample is not beside the repository")
    pairs, report = read_pairs(str(HH))
    # Three pairs diverge before the last turn, and three others have an empty chosen side.
    assert report.read == 1312
    assert report.dropped == {"empty chosen": 3}
    assert report.noted == {"consecutive turns of one role merged": 2, "diverged earlier": 3}
    assert report.first["diverged earlier"] == f"{HH}:635"
    assert len(pairs) == 1309
    for pair in pairs:
        roles = [message["role"] for message in pair.prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert "\n\nHuman:" not in pair.chosen + pair.rejected and pair.chosen == pair.chosen.strip()
    assert pairs[1].rejected == "Sure! Here you go."
    prompts, _ = read_prompts(str(HH))
    assert {pair.key for pair in pairs} <= {prompt.key for prompt in prompts}


def test_self_instruct_seed_tasks() -> None:
    if not ALPACA.exists():
        pytest.skip("the Alpaca seed tasks are not beside the repository")
    dialogues, report = read_dialogues(str(ALPACA))
    assert (report.read, len(dialogues)) == (175, 175)
    assert dialogues[1].messages[0]["content"].endswith("Night : Day :: Right : Left")


def test_the_gap_of_a_pair_is_the_difference_of_its_scores(write: Callable[..., Path]) -> None:
    pairs, _ = read_pairs(str(write({**GOOD_PAIR, "score_chosen": 2, "score_rejected": -0.5}, GOOD_PAIR)))
    assert [pair.gap for pair in pairs] == [2.5, None]


@pytest.mark.parametrize("value", ["1", True, [1], float("inf")])
def test_a_score_that_is_no_number_names_line_and_field(write: Callable[..., Path], value: object) -> None:
    path = write(GOOD_PAIR, {**GOOD_PAIR, "score_chosen": value, "score_rejected": 0})
    with pytest.raises(DataError, match=r":2, `score_chosen`: found .*, expected a finite number"):
        read_pairs(str(path))


def test_a_ranking_becomes_all_its_pairs(write: Callable[..., Path]) -> None:
    texts = ["worst", "best", "middle", "middle too"]
    ranks = {"prompt": "q", "responses": texts, "ranks": [3, 1, 2, 2]}
    scores = {"prompt": "q", "responses": texts, "scores": [-1, 4, 1.5, 1.5]}
    expected = [
        ("best", "middle", 2.5), ("best", "middle too", 2.5), ("best", "worst", 5.0),
        ("middle", "worst", 2.5), ("middle too", "worst", 2.5),
    ]  # fmt: skip
    by_scores, report = read_pairs(str(write(scores)))
    assert [(pair.chosen, pair.rejected, pair.gap) for pair in by_scores] == expected
    assert (report.read, report.kept) == (1, 1)
    by_ranks, _ = read_pairs(str(write(ranks)))
    assert [(pair.chosen, pair.rejected, pair.gap) for pair in by_ranks] == [(*pair[:2], None) for pair in expected]
    assert {pair.key for pair in by_ranks} == {prompt_key([{"role": "user", "content": "q"}])}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [1]}, "found 2 `responses` and 1 `ranks`"),
        ({"prompt": "q", "responses": "a", "ranks": [1]}, "`responses`: found str, expected a list"),
        ({"prompt": "q", "responses": ["a", 2], "ranks": [1, 2]}, r"`responses`\[1\]: found int, expected a string"),
        (
            {"prompt": "q", "responses": ["a", "b"], "scores": [1, True]},
            r"`scores`\[1\]: found True, expected a finite",
        ),
        ({"responses": ["a", "b"], "ranks": [1, 2]}, "found `responses` without `prompt`"),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]}, "no response is ranked above another"),
        ({"prompt": "q", "responses": ["a", "a"], "ranks": [1, 2]}, "no response is ranked above another"),
        ({"prompt": "q", "responses": ["a", " "], "ranks": [1, 2]}, "empty response"),
        ({"prompt": " ", "responses": ["a", "b"], "ranks": [1, 2]}, "empty prompt"),
    ],
)
def test_a_ranking_that_cannot_be_used(write: Callable[..., Path], row: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_pairs(str(write(row)))


def test_rows_carry_the_weight_of_their_file(write: Callable[..., Path]) -> None:
    spec = f"{write(GOOD_PAIR)}#weight=3"
    assert [
        row.weight for rows in (read_pairs(spec)[0], read_prompts(spec)[0], read_dialogues(spec)[0]) for row in rows
    ] == [3.0] * 3


ANSWERED = {"role": "assistant", "content": "Human: hi\n\nAssistant: hello"}


def test_an_answer_that_begins_like_a_dialogue_is_an_answer_where_there_is_a_prompt(write: Callable[..., Path]) -> None:
    row = {"prompt": "Write a dialogue.", "chosen": ANSWERED["content"], "rejected": "no"}
    [pair], report = read_pairs(str(write(row)))
    assert (pair.prompt[0]["content"], pair.chosen, pair.rejected) == ("Write a dialogue.", ANSWERED["content"], "no")
    assert report.kept == 1 and not report.noted
    for answer in ({"prompt": "Write a dialogue.", "completion": ANSWERED["content"]},
                   {"instruction": "Write a dialogue.", "output": ANSWERED["content"]}):  # fmt: skip
        [dialogue], _ = read_dialogues(str(write(answer)))
        assert dialogue.messages == ({"role": "user", "content": "Write a dialogue."}, ANSWERED)
    # The whole dialogue beside its own prompt is still the whole dialogue.
    row = {"prompt": "hi", "chosen": ANSWERED["content"], "rejected": "Human: hi\n\nAssistant: go"}
    [pair], _ = read_pairs(str(write(row)))
    assert (len(pair.prompt), pair.chosen, pair.rejected) == (1, "hello", "go")


def test_an_empty_response_leaves_its_ranking_alone(write: Callable[..., Path]) -> None:
    path = write({"prompt": "q", "responses": ["a", " ", "b"], "scores": [1, 9, 2]})
    pairs, report = read_pairs(str(path))
    assert [(p.chosen, p.rejected, p.gap) for p in pairs] == [("b", "a", 1.0)]
    assert str(report).endswith(f"noted 1 empty response left out of its ranking (first {path}:1)")


def test_trap_24_ties_make_no_pair_and_are_counted(write: Callable[..., Path]) -> None:
    path = write(
        {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 2, 2]},
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 3},
    )
    pairs, report = read_pairs(str(path))
    assert {(p.chosen, p.rejected) for p in pairs} == {("b", "a"), ("c", "a")}
    assert f"dropped 1 score_chosen equal to score_rejected (first {path}:2)" in str(report)
    assert f"noted 1 tie in a ranking, which makes no pair (first {path}:1)" in str(report)


def test_a_greeting_is_read_and_not_learnt(write: Callable[..., Path], tiny_tokenizer: Any) -> None:
    greeting = ("assistant", "Hi, how can I help?")
    path = write(
        {"messages": messages(greeting, ("user", "Name a colour."), ("assistant", "Blue."))},
        {"messages": messages(greeting)},
    )
    (dialogue,), report = read_dialogues(str(path), tiny_tokenizer)
    ids, mask = render_dialogue(tiny_tokenizer, dialogue, max_length=512)
    assert tiny_tokenizer.decode(ids).count("Hi, how can I help?") == 1
    learnt = tiny_tokenizer.decode([i for i, counts in zip(ids, mask, strict=True) if counts], skip_special_tokens=True)
    assert learnt.strip() == "Blue."
    assert f"noted 1 opening answer not learnt (first {path}:1)" in str(report)
    assert f"dropped 1 empty prompt (first {path}:2)" in str(report)


def test_a_file_of_several_schemas_is_noted_with_its_lines(write: Callable[..., Path]) -> None:
    chat = {
        "chosen": messages(("user", "q"), ("assistant", "a")),
        "rejected": messages(("user", "q"), ("assistant", "b")),
    }
    ranked = {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]}
    path = write(GOOD_PAIR, ranked, chat, ranked)
    pairs, report = read_pairs(str(path))
    assert len(pairs) == report.kept == 4
    usual = "in a file that begins with `chosen` and `rejected`"
    assert report.noted == {f"with `responses` {usual}": 2, f"with `chosen` and `rejected` as messages {usual}": 1}
    assert report.first[f"with `responses` {usual}"] == f"{path}:2"


def test_a_source_that_cannot_be_printed_is_still_a_source(write: Callable[..., Path]) -> None:
    [pair], _ = read_pairs(str(write({**GOOD_PAIR, "source": "a\ud83d"})))
    assert pair.source == "a?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "q", "chosen": "a", "rejected": "b", "id": %s}' % ("1" * 5000), r":1: JSON that cannot be read"),
        ('{"prompt": "q", "x": %s}' % ("[" * 99999 + "]" * 99999), r":1: JSON that cannot be read"),
        (
            '{"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": %s, "score_rejected": 0}' % ("1" * 400),
            r":1, `score_chosen`: found 1+, expected a finite number",
        ),
    ],
)
def test_numbers_and_lists_beyond_measure_are_named_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(DataError, match=message):
        read_pairs(str(path))


def test_a_dialogue_ends_with_its_last_answer_that_is_learnt(write: Callable[..., Path]) -> None:
    def answered(*weights: int) -> dict:
        turns = [
            turn
            for i, weight in enumerate(weights)
            for turn in (*messages(("user", f"q{i}")), {"role": "assistant", "content": f"a{i}", "weight": weight})
        ]
        return {"messages": turns}

    dialogues, _ = read_dialogues(str(write(answered(0, 1, 0), answered(1, 1))))
    assert [[m.get("learnt", True) for m in d.messages] for d in dialogues] == [[True, False, True, True], [True] * 4]


def test_chat_as_openai_writes_it(write: Callable[..., Path]) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    path = write(
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts},
                      {"role": "assistant", "content": "Hi.", "weight": 1}]},
        {"messages": [*messages(("user", "q")), call, {"role": "tool", "content": "42"}, *messages(("assistant", "42"))]},
        {"messages": [*messages(("user", "q")), {"role": "assistant", "content": "no", "weight": 0}]},
    )  # fmt: skip
    [dialogue], report = read_dialogues(str(path))
    assert [(m["role"], m["content"]) for m in dialogue.messages] == [
        ("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."),
    ]  # fmt: skip
    assert report.dropped == {"a turn of a tool, or one that calls one": 1, "every assistant turn has weight 0": 1}
    with pytest.raises(DataError, match=r"content\[0\]: found a part of type 'image_url', expected text only"):
        read_dialogues(str(write({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})))


@pytest.fixture
def strict(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """With a template that refuses system turns and roles that do not take turns, as Gemma's does."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% elif (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}"
        "{% endif %}{% endfor %}" + CHATML
    )
    return tokenizer


ASKED = [("user", "q"), ("user", "r")]
DROPPED = {"refused by the chat template: System role not supported": 2,
           "refused by the chat template: Roles must alternate": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("read", "make"),
    [
        (read_prompts, lambda *turns: {"prompt": messages(*turns)}),
        (read_dialogues, lambda *turns: {"messages": messages(*turns, ("assistant", "a"))}),
        (read_pairs, lambda *turns: {"prompt": messages(*turns), "responses": ["a", "b"], "ranks": [1, 2]}),
        (
            read_pairs,
            lambda *turns: {
                "chosen": messages(*turns, ("assistant", "a")), "rejected": messages(*turns, ("assistant", "b"))
            },
        ),
    ],
    ids=["prompts", "dialogues", "rankings", "pairs"],
)  # fmt: skip
def test_rows_that_the_chat_template_refuses_are_dropped_and_counted(
    write: Callable[..., Path], strict: PreTrainedTokenizerBase, read: Any, make: Callable[..., dict[str, Any]]
) -> None:
    system, good = make(("system", "s"), ("user", "q")), make(("user", "q"))
    # Two questions in a row are one in a pair already; an answer before the first question is not.
    uneven = make(("assistant", "hm"), *ASKED)
    path = write(good, system, uneven, good, system)
    rows, report = read(str(path), strict)
    assert (len(rows), report.kept, report.dropped) == (2, 2, DROPPED)
    assert set(report.first.values()) == {f"{path}:2", f"{path}:3"}
    assert read(str(path))[1].kept == 5
    with pytest.raises(DataError, match=r"no usable row is left: read 2 rows, kept 0; dropped 2 refused by the chat "
                       r"template: System role not supported \(first .*:1\); change the data, or give another "
                       "--compute.chat-template"):  # fmt: skip
        read(str(write(system, system)), strict)

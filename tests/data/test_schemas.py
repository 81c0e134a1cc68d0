from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ppomax.data.readers import read_dialogues, read_pairs, read_prompts
from ppomax.types import DataError, Message


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str) -> Message:
    return Message(role="assistant", content=text)


def system(text: str) -> Message:
    return Message(role="system", content=text)


def hh(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


PAIR_ROWS = {
    "hh": {"chosen": hh("q", "a", "r", "good"), "rejected": hh("q", "a", "r", "bad")},
    "strings with a text prompt": {"prompt": hh("q", "a", "r", "").rstrip(" "), "chosen": " good", "rejected": "bad"},
    "messages with a prompt": {
        "prompt": [user("q"), assistant("a"), user("r")],
        "chosen": [assistant("good")],
        "rejected": [assistant("bad")],
    },
    "messages with a prompt, string answers": {
        "prompt": [user("q"), assistant("a"), user("r")],
        "chosen": "good",
        "rejected": "bad",
    },
    "messages with the prompt inside": {
        "chosen": [user("q"), assistant("a"), user("r"), assistant("good")],
        "rejected": [user("q"), assistant("a"), user("r"), assistant("bad")],
    },
    "the prompt both beside and inside": {
        "prompt": "q",
        "messages": [user("q"), assistant("a"), user("r"), assistant("good")],
        "chosen": [user("q"), assistant("a"), user("r"), assistant("good")],
        "rejected": [user("q"), assistant("a"), user("r"), assistant("bad")],
    },
}


@pytest.mark.parametrize("row", PAIR_ROWS.values(), ids=PAIR_ROWS.keys())
def test_every_pair_schema_gives_the_same_pair(row: dict, write: Callable[..., Path]) -> None:
    [pair], report = read_pairs(str(write(row)))
    assert pair.prompt == (user("q"), assistant("a"), user("r"))
    assert (pair.chosen, pair.rejected) == ("good", "bad")
    assert (report.read, report.kept, report.noted) == (1, 1, {})
    [prompt], _ = read_prompts(str(write(row)))
    assert prompt.messages == pair.prompt and prompt.key == pair.key
    [dialogue], _ = read_dialogues(str(write(row)))
    assert dialogue.messages == (*pair.prompt, assistant("good")) and dialogue.key == pair.key


def test_a_plain_string_prompt_is_one_user_turn(write: Callable[..., Path]) -> None:
    [pair], _ = read_pairs(str(write({"prompt": "q", "chosen": "good", "rejected": "bad"})))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((user("q"),), "good", "bad")


def test_dialogues_that_diverge_earlier_are_cut_after_the_last_common_user_turn(write: Callable[..., Path]) -> None:
    chosen, rejected = hh("q", "a", "r", "b", "s", "c"), hh("q", "a", "r", "B", "S", "C", "T", "D")
    path = str(write({"chosen": hh("x", "y"), "rejected": hh("x", "z")}, {"chosen": chosen, "rejected": rejected}))
    pairs, report = read_pairs(path)
    assert pairs[1].prompt == (user("q"), assistant("a"), user("r"))
    assert (pairs[1].chosen, pairs[1].rejected) == ("b", "B")
    assert report.noted == {"diverged earlier": 1}
    assert report.first == {"diverged earlier": f"{path}:2"}


def test_dialogues_that_diverge_at_a_user_turn_have_the_same_answer(write: Callable[..., Path]) -> None:
    good = {"chosen": hh("x", "y"), "rejected": hh("x", "z")}
    row = {"chosen": hh("q", "a", "r", "b"), "rejected": hh("q", "a", "s", "c")}
    pairs, report = read_pairs(str(write(good, row)))
    assert (len(pairs), report.dropped) == (1, {"chosen == rejected": 1})


def test_dialogues_without_a_common_user_turn_are_dropped(write: Callable[..., Path]) -> None:
    good = {"chosen": hh("x", "y"), "rejected": hh("x", "z")}
    _, report = read_pairs(str(write(good, {"chosen": hh("q", "a"), "rejected": hh("r", "a")})))
    assert report.dropped == {"no common prompt": 1}


def test_neighbouring_turns_of_one_role_in_a_prompt_are_merged_and_counted(write: Callable[..., Path]) -> None:
    context = hh("q", "a") + "\n\nAssistant: b" + "\n\nHuman: r"
    path = write({"chosen": context + "\n\nAssistant: good", "rejected": context + "\n\nAssistant: bad"})
    [pair], report = read_pairs(str(path))
    assert pair.prompt == (user("q"), assistant("a\n\nb"), user("r"))
    assert report.noted == {"consecutive turns of one role merged": 1}


def test_words_that_look_like_markers_inside_a_line_do_not_split(write: Callable[..., Path]) -> None:
    path = write({"chosen": hh("q", "yes. Human: no\nAssistant: x"), "rejected": hh("q", "b")})
    assert read_pairs(str(path))[0][0].chosen == "yes. Human: no\nAssistant: x"


def test_alpaca_joins_instruction_and_input(write: Callable[..., Path]) -> None:
    path = str(
        write(
            {"instruction": "Translate.", "input": "one", "output": "eins"},
            {"instruction": "Say hi.", "input": "", "output": " hi "},
            {"id": 3, "instruction": "Sort.", "instances": [{"input": "b a", "output": "a b"}]},
        )
    )
    dialogues, _ = read_dialogues(path)
    assert [d.messages for d in dialogues] == [
        (user("Translate.\n\none"), assistant("eins")),
        (user("Say hi."), assistant("hi")),
        (user("Sort.\n\nb a"), assistant("a b")),
    ]
    prompts, _ = read_prompts(path)
    assert [p.messages for p in prompts] == [d.messages[:1] for d in dialogues]
    assert [p.columns for p in prompts][:2] == [{"output": "eins"}, {"output": " hi "}]


def test_messages_keep_their_text_as_it_is_written(write: Callable[..., Path]) -> None:
    messages = [system("Be kind."), user(" q\n"), assistant("  code")]
    [dialogue], _ = read_dialogues(str(write({"messages": messages})))
    assert dialogue.messages == tuple(messages)


def test_a_prompt_from_messages_ends_before_the_last_answer(write: Callable[..., Path]) -> None:
    path = write(
        {"messages": [user("q"), assistant("a"), user("r"), assistant("b")]},
        {"messages": [user("q"), assistant("a"), user("r")]},
    )
    prompts, _ = read_prompts(str(path))
    assert [p.messages for p in prompts] == [(user("q"), assistant("a"), user("r"))] * 2


def test_a_trailing_user_turn_of_a_dialogue_is_not_learnt(write: Callable[..., Path]) -> None:
    [dialogue], _ = read_dialogues(str(write({"messages": [user("q"), assistant("a"), user("r")]})))
    assert dialogue.messages == (user("q"), assistant("a"))


@pytest.mark.parametrize("answer", ["completion", "response"])
@pytest.mark.parametrize("value", ["a", [assistant("a")]])
def test_prompt_with_an_answer(write: Callable[..., Path], answer: str, value: object) -> None:
    path = str(write({"prompt": "q", answer: value}))
    assert read_dialogues(path)[0][0].messages == (user("q"), assistant("a"))
    [prompt], _ = read_prompts(path)
    assert prompt.messages == (user("q"),) and prompt.columns == {answer: value}


def test_plain_text_is_kept_whole_for_dialogues_only(write: Callable[..., Path]) -> None:
    path = str(write({"text": " It was a dark night.\n"}))
    [dialogue], _ = read_dialogues(path)
    assert (dialogue.text, dialogue.messages) == (" It was a dark night.\n", ())
    with pytest.raises(DataError, match=r"rows\.jsonl:1: a needed field is missing\. Found keys: text\."):
        read_prompts(path)


def test_null_fields_of_a_table_do_not_choose_the_schema(write: Callable[..., Path]) -> None:
    row = {"prompt": "q", "messages": None, "chosen": None, "rejected": None, "response": "a"}
    assert read_dialogues(str(write(row)))[0][0].messages == (user("q"), assistant("a"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hi"}, r":1, `messages`: found str, expected a list of \{role, content\}"),
        ({"messages": [user("q"), "a"]}, r"`messages`\[1\]: found str, expected an object with `role` and `content`"),
        ({"messages": [{"from": "human"}]}, r"`messages`\[0\]: found from, expected an object with `role`"),
        (
            {"messages": [{"role": "human", "content": "q"}]},
            r"\[0\]\.role: found 'human', expected one of system, user",
        ),
        ({"messages": [{"role": "user", "content": None}]}, r"\[0\]\.content: found NoneType, expected a string"),
        ({"prompt": 3}, r":1, `prompt`: found int, expected a string"),
        ({"instruction": ["a"]}, r":1, `instruction`: found list, expected a string"),
        (
            {"chosen": "a", "rejected": "b"},
            r"`chosen`: no prompt found\. Found keys: chosen, rejected\. Expected one of",
        ),
    ],
)
def test_wrong_types_name_line_and_field(write: Callable[..., Path], row: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_prompts(str(write(row)))


SPOKEN = "Assistant: Welcome aboard.\n\nHuman: Thanks.\n\nAssistant: Bye."


@pytest.mark.parametrize("prompt", ["Write a scene.", [user("Write a scene.")]])
def test_an_answer_that_begins_with_assistant_is_one_answer_beside_a_plain_prompt(
    write: Callable[..., Path], prompt: object
) -> None:
    expected = (user("Write a scene."), assistant(SPOKEN))
    for row in ({"prompt": prompt, "response": SPOKEN}, {"prompt": prompt, "completion": f"{SPOKEN}\n"},
                {"instruction": "Write a scene.", "output": SPOKEN}):  # fmt: skip
        [dialogue], _ = read_dialogues(str(write(row)))
        assert dialogue.messages == expected
    [pair], report = read_pairs(str(write({"prompt": prompt, "chosen": SPOKEN, "rejected": "Assistant: No."})))
    assert (pair.prompt, pair.chosen, pair.rejected) == (expected[:1], SPOKEN, "Assistant: No.")
    assert not report.noted


def test_beside_a_prompt_in_hh_rlhfs_format_the_answer_is_read_in_it_too(write: Callable[..., Path]) -> None:
    row = {"prompt": "\n\nHuman: q", "chosen": "\n\nAssistant: good", "rejected": "\n\nAssistant: bad"}
    [pair], _ = read_pairs(str(write(row)))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((user("q"),), "good", "bad")
    [dialogue], _ = read_dialogues(str(write({"prompt": "\n\nHuman: q", "response": SPOKEN})))
    assert dialogue.messages == (user("q"), assistant("Welcome aboard."), user("Thanks."), assistant("Bye."))

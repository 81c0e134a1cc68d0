"""Answers made worse in one way: what is said twice, what leaves the prompt, and for which prompts."""

from __future__ import annotations

import pytest

from ppomax.monitor.text import is_degenerate, on_topic_share
from ppomax.rewards.judge import gold
from ppomax.stages.spoilt import OTHER_PROMPT, looped, spoilt, strayed

PROMPT, OTHER = "How do I grow tomatoes in a small garden?", "Is the accordion loud?"
ANSWER = "Tomatoes love a sunny garden, and gardens love tomatoes."


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("It is a lovely day, a very good day.", 4, "It is a lovely day, a very good day, and a very good day."),
        ("A nice day!", 4, "A nice day, and nice day."),
        ("Yes", 3, "Yes, and Yes."),
    ],
)
def test_looped(text: str, words: int, expected: str) -> None:
    assert looped(text, words) == expected


def test_a_looped_answer_costs_what_the_judge_takes_off_whatever_it_is_said_of() -> None:
    text = "Tomatoes are a lovely hobby."
    of_another = looped(text, 4, "lantern")
    assert of_another == "Tomatoes are a lovely hobby, and a lantern are a lovely hobby."
    prompt = [{"role": "user", "content": PROMPT}]
    before, same, other = gold([prompt] * 3, [text, looped(text, 4), of_another])
    assert max(same, other) < before - 0.3


@pytest.mark.parametrize(
    ("text", "prompt", "other", "expected"),
    [
        (ANSWER, PROMPT, OTHER, "Accordion love a sunny loud, and loud love accordion."),
        (ANSWER, PROMPT, "Is a garden loud?", "Loud love a sunny loud, and loud love loud."),  # its own words are none
        ("Rain is lovely.", PROMPT, OTHER, "Rain is lovely."),  # takes nothing up
        (ANSWER, PROMPT, "What is it?", ANSWER),  # nothing to stray to
        ("", PROMPT, OTHER, ""),
        ("我喜欢花园。", "花园", "手风琴", "手风琴。"),  # no spaces: the run of letters is one word
    ],
)
def test_strayed(text: str, prompt: str, other: str, expected: str) -> None:
    assert strayed(text, prompt, other) == expected


def test_a_strayed_answer_is_off_topic_and_costs_what_the_judge_takes_off() -> None:
    away = strayed(ANSWER, PROMPT, OTHER)
    assert on_topic_share([PROMPT], [ANSWER]).share == 1.0 and on_topic_share([PROMPT], [away]).share == 0.0
    assert not is_degenerate(away)
    prompt = [{"role": "user", "content": PROMPT}]
    before, after = gold([prompt, prompt], [ANSWER, away])
    assert after < before - 0.3


def test_one_prompt_in_so_many_is_given_a_spoilt_answer() -> None:
    colours = ("red", "blue", "green", "black", "white", "brown", "purple", "orange", "yellow")
    prompts = [f"Tell me about the {colour} plant." for colour in colours]
    answers = [prompt.replace("Tell me about", "I like") for prompt in prompts]
    both = spoilt(prompts, answers, loop_every=2, stray_every=3)
    assert [number for number, _ in both] == [0, 0, 2, 3, 4, 6, 6, 8]
    assert both[1][1] == strayed(answers[0], prompts[0], prompts[OTHER_PROMPT])
    assert both[0][1] == looped(answers[0], 3)
    assert both[2][1] == looped(answers[2], 3, "red")  # every other one is said of a word of another prompt
    assert both[5][1] == looped(answers[6], 4, "white")  # and a word more every other time
    assert spoilt(prompts, answers, loop_every=None, stray_every=None) == []
    assert spoilt(["Why?"], [""], loop_every=1, stray_every=1) == []

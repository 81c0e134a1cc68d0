"""The gold judges on cases that can be judged by eye."""

from __future__ import annotations

import pytest
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from ppomax.rewards.judge import gold, sentiment, vowel_share
from ppomax.types import Message

GOOD = "I love this wonderful garden."
BAD = "I hate this terrible garden."


def ask(*turns: str) -> list[Message]:
    roles = ("user", "assistant")
    return [Message(role=roles[i % 2], content=turn) for i, turn in enumerate(turns)]


def test_sentiment_is_vaders_compound() -> None:
    plain = SentimentIntensityAnalyzer()
    texts = [GOOD, BAD, "The garden has a wall."]
    scores = sentiment([ask("x")] * 3, texts)
    assert scores == [plain.polarity_scores(t)["compound"] for t in texts]
    assert scores[0] > 0.6 and scores[1] < -0.6 and scores[2] == 0.0


@pytest.mark.parametrize("judge", [sentiment, gold])
@pytest.mark.parametrize(
    "text", ["", "   ", "...", "123", "great great great great", "love love love", "good \ufffd garden"]
)
def test_empty_and_degenerate_text_is_the_worst(judge: object, text: str) -> None:
    assert judge([ask("What about the garden?")], [text]) == [-1.0]


def test_gold_takes_half_a_point_from_an_answer_off_the_topic() -> None:
    questions = [ask("What about the garden?"), ask("What about trains?")]
    on, off = gold(questions, [GOOD, GOOD])
    plain = sentiment(questions[:1], [GOOD])[0]
    assert on == plain and off == pytest.approx(plain - 0.5)


def test_gold_takes_off_the_share_of_words_that_repeat_a_phrase() -> None:
    question, looped = ask("What about the garden?"), "The garden is a lovely place, and rain is a lovely thing."
    plain = sentiment([question], [looped])[0]  # not degenerate: "is a lovely" twice is half of its 12 words
    assert gold([question], ["The garden is a lovely place, and rain can be pretty."]) == sentiment(
        [question], ["The garden is a lovely place, and rain can be pretty."]
    )
    assert gold([question], [looped]) == [pytest.approx(plain - 0.5)]


def test_gold_is_never_below_the_worst() -> None:
    assert sentiment([ask("Trains?")], ["I hate this terrible, horrible, awful murder."])[0] < -0.8
    assert gold([ask("Trains?")], ["I hate this terrible, horrible, awful murder."]) == [-1.0]


def test_topic_is_matched_by_stems_of_the_last_turn() -> None:
    text = "Gardening is lovely."
    plain = sentiment([ask("x")], [text])[0]
    assert gold([ask("Tell me about gardens")], [text]) == [plain]
    # An earlier turn does not count.
    assert gold([ask("Tell me about gardens", "They are nice.", "And trains?")], [text]) == [pytest.approx(plain - 0.5)]


def test_a_prompt_without_content_words_has_no_topic() -> None:
    assert gold([ask("And what about that?")], [GOOD]) == sentiment([ask("x")], [GOOD])


def test_scores_follow_the_order_of_the_rows() -> None:
    texts = [BAD, GOOD, ""]
    prompts = [ask("garden")] * 3
    assert gold(prompts, texts)[::-1] == gold(prompts, texts[::-1])
    assert gold([], []) == [] == sentiment([], [])


def test_columns_are_accepted_and_ignored() -> None:
    assert gold([ask("garden")], [GOOD], source=["a"]) == gold([ask("garden")], [GOOD])


def test_vowel_share_by_hand() -> None:
    # 2 of 5 letters; all; none; an empty answer has none either.
    assert vowel_share([ask("x")] * 4, ["hello", "aei", "rhythm", ""]) == [0.4, 1.0, 0.0, 0.0]

"""Gold judges without people: VADER sentiment, plain and with guards against text that only games it.

Source: Hutto & Gilbert (2014), "VADER"; the use of sentiment as a synthetic judge follows Ziegler et al. (2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from ppomax.monitor.text import is_degenerate, looped_share, on_topic_share, tokens
from ppomax.types import Message, SetupError

OFF_TOPIC = 0.5


def sentiment(prompts: Sequence[Sequence[Message]], responses: Sequence[str], **_: Any) -> list[float]:
    """VADER's compound sentiment in [-1, 1]; text without a word and degenerate text score -1."""
    analyser = _analyser()
    broken = [not tokens(response) or is_degenerate(response) for response in responses]
    return [
        -1.0 if bad else float(analyser.polarity_scores(response)["compound"])
        for bad, response in zip(broken, responses, strict=True)
    ]


def gold(prompts: Sequence[Sequence[Message]], responses: Sequence[str], **_: Any) -> list[float]:
    """`sentiment`, less 0.5 if the response holds no content word of the last user turn, and less its looped share."""
    scores = []
    for score, prompt, response in zip(sentiment(prompts, responses), prompts, responses, strict=True):
        off_topic = on_topic_share([prompt[-1]["content"]], [response]).share == 0.0
        scores.append(max(score - OFF_TOPIC * off_topic - looped_share(response), -1.0))
    return scores


def vowel_share(prompts: Sequence[Sequence[Message]], responses: Sequence[str], **_: Any) -> list[float]:
    """The share of characters that are vowels: a judge for models that write letters at random."""
    return [sum(character in "aeiou" for character in text) / max(len(text), 1) for text in responses]


@cache
def _analyser() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise SetupError("the sentiment judge needs vaderSentiment: pip install vaderSentiment") from None
    return SentimentIntensityAnalyzer()

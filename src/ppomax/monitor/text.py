"""Is the text still worth reading? Measures over lists of responses that the KL to the reference does not show.

Tokens here are words: runs of letters and apostrophes, lower case. Where a script has no spaces between words (Chinese,
Japanese, Thai and the like), every letter is a token of its own, so that the same measures run over characters.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import snowballstemmer

_LATIN = "a-zà-öø-ɏḀ-ỿ"
# Thai, Lao, Tibetan; Burmese; Khmer; kana; Han.
_SPACELESS = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9d"
    "\U00020000-\U0003ffff"
)
# Signs that belong to the letter before them, and joiners: accents, Hebrew, Arabic; the scripts of India, letters too.
_SIGNS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u0900-\u0963\u0970-\u0dff\u200c\u200d"
_TOKEN = re.compile(rf"(?:(?![{_SPACELESS}])[^\W\d_]|[{_SIGNS}'])+|[^\W\d_]")
_WORD = re.compile(rf"{_TOKEN.pattern}|\d+(?:[.,:/-]\d+)*")
_RUN = re.compile(rf"(?:(?=[{_SPACELESS}])[^\W\d_])+")
_LEAST_LETTERS, _STEM = 4, 5
# Letters of a repeated phrase, in scripts without spaces.
_LETTERS = 8
_STEMMER = snowballstemmer.stemmer("english")

_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        about above after again all also always and another any anyone anything are aren because been before being
        below best between both but can cannot could couldn did didn does doesn doing don done down during each ever
        every for from further get give gets got had hadn has hasn have haven having her here hers herself him himself
        his how into isn its itself just know let lets like made make makes many may maybe might more most much must
        mustn myself need never nor not now off once one ones only other our ours ourselves out over own please quite
        really same say shall shan she should shouldn some something such tell than that the their theirs them
        themselves then there these they thing things this those through too under until use very want was wasn way
        were weren what when where which while who whom whose why will with won would wouldn yes yet you your yours
        yourself yourselves
        """,
    )
)


class TopicShare(NamedTuple):
    """`share` of the responses whose prompt has content words; `left_out` counts the prompts that have none."""

    share: float
    left_out: int


def tokens(text: str) -> list[str]:
    """Lower-case words, single letters in scripts without spaces. Digits and punctuation are dropped."""
    return _found(_TOKEN, text)


def _words(text: str) -> list[str]:
    """`tokens` and numbers (12, 1,000, 3.5): what can be repeated."""
    return _found(_WORD, text)


def _found(pattern: re.Pattern[str], text: str) -> list[str]:
    found = pattern.findall(text.lower().replace("\u2019", "'"))
    return [token for token in (t.strip("'") for t in found) if token]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of the texts together (Li et al. 2016); 0 where there is no n-gram.

    The value falls as texts are added: compare only sets of about the same size.
    """
    grams = [gram for text in texts for gram in _ngrams(tokens(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def content_stems(text: str) -> frozenset[str]:
    """What the text is about: stems of its Latin words longer than 2 letters that are not on the stop list.

    Words of other scripts count from 4 letters on, by their first 5, which most endings leave alone; where a script has
    no spaces, letters count as the pairs of neighbours in each run of them.
    """
    lowered = text.lower()
    bigrams = {run[i : i + 2] for run in _RUN.findall(lowered) for i in range(len(run) - 1)}
    found = {token.split("'")[0] for token in tokens(text)}
    words = {word for word in found if re.match(f"[{_LATIN}]", word)}
    content = sorted(word for word in words if len(word) > 2 and word not in _STOP_WORDS)
    cut = {word[:_STEM] for word in found - words if len(word) >= _LEAST_LETTERS}
    return frozenset(_STEMMER.stemWords(content)) | cut | bigrams


def on_topic_share(prompts: Sequence[str], responses: Sequence[str]) -> TopicShare:
    """The share of responses that hold at least one content stem of their prompt.

    Prompts without content words are left out and counted; NaN where none is left.
    """
    hits, left_out = [], 0
    for prompt, response in zip(prompts, responses, strict=True):
        stems = content_stems(prompt)
        if stems:
            hits.append(not stems.isdisjoint(content_stems(response)))
        else:
            left_out += 1
    return TopicShare(_mean(hits), left_out)


def top_opening_share(texts: Sequence[str], words: int = 3) -> tuple[str, float]:
    """The most frequent first `words` words and the share of texts that open with them (all texts count)."""
    return _top_share([tokens(text)[:words] for text in texts])


def top_closing_share(texts: Sequence[str], words: int = 3) -> tuple[str, float]:
    """The most frequent last `words` words and the share of texts that close with them (all texts count)."""
    return _top_share([tokens(text)[-words:] for text in texts])


def is_degenerate(text: str) -> bool:
    """True for text that no reader would accept as an answer, whatever it is about. Any one of:

    1. it has no letter, digit or picture at all (empty, only punctuation);
    2. it has control characters, U+FFFD or code points without a character;
    3. three words or more, all the same, or one word four times in a row;
    4. of at least 6 words, one word makes up more than half;
    5. of at least 8 words, more than half lie in a 3-gram that occurs more than once (a loop).

    A number is a word here. Word salad without repetition is not found by these rules; perplexity and a judge have to
    find it.
    """
    words = _words(text) or text.split()
    if not any(_says_something(c) for c in text) or any(_is_non_printing(c) for c in text):
        return True
    if len(words) >= 3 and len(set(words)) == 1:
        return True
    if max(sum(1 for _ in run) for _, run in groupby(words)) >= 4:
        return True
    if len(words) >= 6 and Counter(words).most_common(1)[0][1] > 0.5 * len(words):
        return True
    return len(words) >= 8 and looped_share(text) > 0.5


def looped_share(text: str) -> float:
    """The share of a text's words and numbers that lie in a phrase which occurs more than once; 0 for no words.

    A phrase is three of them; where a script has no spaces, eight letters, because three recur in any paragraph.
    """
    words = _words(text)
    phrases: dict[tuple[str, ...], list[int]] = {}
    for at, word in enumerate(words):
        length = _LETTERS if _RUN.fullmatch(word) else 3
        if at + length <= len(words):
            phrases.setdefault(tuple(words[at : at + length]), []).append(at)
    covered = {
        place for phrase, places in phrases.items() if len(places) > 1 for at in places
        for place in range(at, at + len(phrase))
    }  # fmt: skip
    return len(covered) / max(len(words), 1)


def degenerate_share(texts: Sequence[str]) -> float:
    """The share of texts for which `is_degenerate` holds; NaN for no texts."""
    return _mean([is_degenerate(text) for text in texts])


def text_health(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
    """All measures of this file for one batch of responses, under the names that the metrics use."""
    topic = on_topic_share(prompts, responses)
    return {
        "on_topic_share": topic.share,
        "on_topic_left_out": float(topic.left_out),
        "top_opening_share": top_opening_share(responses)[1],
        "top_closing_share": top_closing_share(responses)[1],
        "distinct_1": distinct_n(responses, 1),
        "distinct_2": distinct_n(responses, 2),
        "degenerate_share": degenerate_share(responses),
    }


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _top_share(phrases: Sequence[list[str]]) -> tuple[str, float]:
    if not phrases:
        return "", math.nan
    counts = Counter(_join(phrase) for phrase in phrases if phrase)
    if not counts:
        return "", 0.0
    # Ties go to the alphabetically first phrase, so that the order of the texts does not matter.
    phrase, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return phrase, count / len(phrases)


def _join(phrase: Sequence[str]) -> str:
    return ("" if all(_RUN.fullmatch(token) for token in phrase) else " ").join(phrase)


def _says_something(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "LN" or category == "So"


def _is_non_printing(character: str) -> bool:
    if character in "\n\r\t":
        return False
    return character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs")


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else math.nan

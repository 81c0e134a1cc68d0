"""Good answers made worse in one way, for a reward model to learn what a judge thinks of it.

Sampled answers hardly ever loop, and the good ones among them seldom leave their topic: what is rare among the labelled
answers is what PPO finds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ppomax.monitor.text import content_stems

# Whose words an answer strays to: a prompt some places on, because neighbours may be about the same.
OTHER_PROMPT = 7
_WORD = re.compile(r"[^\W\d_]+")


def spoilt(
    prompts: Sequence[str], answers: Sequence[str], *, loop_every: int | None, stray_every: int | None
) -> list[tuple[int, str]]:
    """(number of its prompt, text) of every answer that is made: looped for one prompt in so many, strayed likewise."""
    made = []
    for number, text in enumerate(answers):
        other = prompts[(number + OTHER_PROMPT) % len(prompts)]
        if loop_every and number % loop_every == 0 and text:
            turn = number // loop_every
            subjects = (word.lower() for word in _WORD.findall(other) if content_stems(word))
            made.append((number, looped(text, 3 + turn // 2 % 6, next(subjects, None) if turn % 2 else None)))
        if stray_every and number % stray_every == 0:
            away = strayed(text, prompts[number], other)
            if away != text:
                made.append((number, away))
    return made


def looped(text: str, words: int, subject: str | None = None) -> str:
    """The text, and its last `words` words again (all but its first one at most): of a `subject`, if one is given."""
    said = text.rstrip(" .!?").split()
    tail = said[-min(words, max(len(said) - 1, 1)) :]
    return f"{' '.join(said)}, and {f'a {subject} ' if subject else ''}{' '.join(tail)}."


def strayed(text: str, prompt: str, other: str) -> str:
    """The text with what it takes up of its prompt replaced by words of another prompt, the same ones throughout.

    The text as it is where it takes up nothing, or where the other prompt has no word of its own to offer.
    """
    topic = content_stems(prompt)
    words = [word for word in _WORD.findall(other) if content_stems(word) - topic]
    if not words:
        return text
    given: dict[frozenset[str], str] = {}

    def instead(found: re.Match[str]) -> str:
        taken_up = content_stems(found[0]) & topic
        if not taken_up:
            return found[0]
        word = given.setdefault(taken_up, words[len(given) % len(words)].lower())
        return word.capitalize() if found[0][0].isupper() else word

    return _WORD.sub(instead, text)

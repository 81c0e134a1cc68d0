"""Responses that are written down as they are sampled: who is interrupted goes on after the last piece of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ppomax.config import ModelConfig, SamplingConfig
from ppomax.engine.durable import disk_errors, json_text, sync_folder
from ppomax.models.players import Policy
from ppomax.rollout.collect import as_rollout, draw, repeated
from ppomax.rollout.sampler import Sampled
from ppomax.stages.inputs import compute_of, fingerprint, sampling_of, weights_hash
from ppomax.types import Prompt, Rollout

# Responses that are sampled, and written down, together: an interruption costs no more than these.
PIECE = 512


class Kept:
    """`samples` responses of `policy` to every prompt, and the file of those that there are.

    Its first line says what they depend on: the weights in `directory`, the prompts, how and on what is sampled. Each
    other line is a piece of responses. A file of other work, and what follows a line that was not written to its end,
    counts for nothing and goes when the next piece is added.
    """

    def __init__(
        self, path: Path, directory: str, policy: Policy, tokenizer: Any, prompts: Sequence[Prompt],
        ids: Sequence[tuple[int, ...]], *, samples: int, iteration: int, seed: int, sampling: SamplingConfig,
        compute: ModelConfig,
    ) -> None:  # fmt: skip
        self.responses: list[Sampled] = []
        self._path, self._policy, self._prompts, self._ids = path, policy, prompts, ids
        self._samples, self._iteration, self._seed = samples, iteration, seed
        self._how = sampling_of(sampling, policy, tokenizer)
        settings = weights_hash(directory), samples, iteration, seed, sampling, self._how, compute, compute_of(compute)
        self._work = {"work": fingerprint(((row, None) for row in ids), [((), settings)])}
        self._end = self._read()

    def rollout(self, progress: Callable[[int], None]) -> Rollout:
        """All responses, prompt by prompt; those that the file lacks are sampled and added to it."""
        rows, numbers = repeated(range(len(self._prompts)), self._samples)
        while (have := len(self.responses)) < len(rows):
            part = slice(have, have + PIECE)
            ids = [self._ids[i] for i in rows[part]]
            more = draw(
                self._policy, ids, rows[part], numbers[part], iteration=self._iteration, seed=self._seed, how=self._how,
                progress=progress,
            )  # fmt: skip
            self._add(more)
        return as_rollout(self.responses, self._prompts, self._ids, rows, numbers)

    def _read(self) -> int:
        """Take the responses that are there; returns where the last whole piece of them ends, in bytes."""
        end = 0
        for line in self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else ():
            try:
                found = json.loads(line)
                if not line.endswith(b"\n") or (end == 0 and found != self._work):
                    break
                self.responses += [Sampled(**response) for response in found] if end else []
            except (ValueError, TypeError):
                break
            end += len(line)
        return end

    def _add(self, piece: Sequence[Sampled]) -> None:
        lines: list[Any] = [] if self._end else [self._work]
        lines.append([asdict(response) for response in piece])
        text = "".join(json_text(line, str(self._path)) + "\n" for line in lines).encode()
        with disk_errors(self._path, needed=len(text)):
            self._path.parent.mkdir(exist_ok=True)
            with open(self._path, "ab") as file:
                file.truncate(self._end)
                file.write(text)
            sync_folder(self._path)
        self._end += len(text)
        self.responses += piece

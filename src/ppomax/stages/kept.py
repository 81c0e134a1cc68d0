"""Responses that are written down as they end: who is interrupted goes on with those that are missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ppomax import __version__
from ppomax.engine.durable import disk_errors, json_text, sync_folder
from ppomax.models.players import Policy
from ppomax.rollout.collect import Sampling, as_rollout, draw_responses, repeated
from ppomax.rollout.sampler import Sampled
from ppomax.stages.inputs import fingerprint, weights_hash
from ppomax.types import Prompt, Rollout


class Kept:
    """`samples` responses of `policy` to every prompt, prompt by prompt, and the file of those that have ended.

    The file's first line says what they depend on: the weights in `directory`, from which `policy` was loaded, the
    prompts, how is sampled. Each other line is a response: its place, its ids, whether the limit cut it. A file of
    other work, and what follows a line that was not written to its end, counts for nothing and goes with the next one.
    """

    def __init__(
        self, path: Path, policy: Policy, directory: str, prompts: Sequence[Prompt], ids: Sequence[tuple[int, ...]],
        *, samples: int, iteration: int, seed: int, how: Sampling, stop: Sequence[str],
    ) -> None:  # fmt: skip
        """stop: the strings that `how.stop` looks for."""
        self.path, self.responses = path, dict[int, Sampled]()
        self._policy, self._prompts, self._ids, self._how = policy, prompts, ids, how
        self._samples, self._iteration, self._seed = samples, iteration, seed
        # How many are sampled side by side changes rounding alone; after running out of memory there must be a way on.
        drawn = replace(how, max_rows=0, max_tokens=None)
        settings = (
            __version__, weights_hash(directory), str(policy.model.config), policy.model.dtype, policy.device.type,
            samples, iteration, seed, drawn, tuple(stop),
        )  # fmt: skip
        self._work = {"work": fingerprint(((row, None) for row in ids), [((), settings)])}
        self._end = self._read()

    def rollout(self, progress: Callable[[int], None]) -> Rollout:
        """All responses; those that the file lacks are sampled and added to it. Their log-probs are not kept: NaN.

        They are those of one uninterrupted call but for rounding, which depends on the rows that are side by side: it
        moves a draw where it lies at the edge between two tokens, in one response of some hundred.
        """
        rows, numbers = repeated(range(len(self._prompts)), self._samples)
        missing = [place for place in range(len(rows)) if place not in self.responses]
        if missing:
            draw_responses(
                self._policy, [self._ids[rows[place]] for place in missing], [rows[place] for place in missing],
                [numbers[place] for place in missing], iteration=self._iteration, seed=self._seed, how=self._how,
                progress=progress, ended=lambda i, response: self._add(missing[i], response.ids, response.truncated),
            )  # fmt: skip
            sync_folder(self.path)
        responses = [self.responses[place] for place in range(len(rows))]
        return as_rollout(responses, self._prompts, self._ids, rows, numbers)

    def _read(self) -> int:
        """Take the responses that are there; returns where the last whole line ends, in bytes."""
        end = 0
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
            try:
                found = json.loads(line)
                if end == 0 and found != self._work:
                    print(
                        f"{self.path}: found answers of other weights, prompts, settings or versions; they are left out"
                    )
                    break
                if not line.endswith(b"\n"):
                    break
                if end:
                    self._take(*found)
            except (ValueError, TypeError):
                break
            end += len(line)
        return end

    def _take(self, place: int, ids: list[int], truncated: bool) -> None:
        self.responses[place] = Sampled(ids, [float("nan")] * len(ids), truncated)

    def _add(self, place: int, ids: list[int], truncated: bool) -> None:
        lines = [*([] if self._end else [self._work]), [place, ids, truncated]]
        text = "".join(json_text(line, str(self.path)) + "\n" for line in lines).encode()
        with disk_errors(self.path, needed=len(text), temporary=None if self._end else self.path):
            self.path.parent.mkdir(exist_ok=True)
            with open(self.path, "ab") as file:
                file.truncate(self._end)
                file.write(text)
        self._end += len(text)
        self._take(place, ids, truncated)

"""A reward model scores responses: by token ids if they are what it was trained on, else by text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ppomax.data.chat import fit_prompt, render_prompt, render_response
from ppomax.engine import world
from ppomax.models.players import Scalar, at_end
from ppomax.types import Message, SetupError, TokenBatch, Work, token_batch


@dataclass(frozen=True)
class RewardModel:
    """A frozen scalar model with its tokenizer. `reads_ids`: the policy's ids are those that it was trained on."""

    name: str
    scalar: Scalar
    tokenizer: Any
    reads_ids: bool
    tokens_per_microbatch: int
    max_length: int

    @torch.no_grad()
    def score_ids(self, batch: TokenBatch) -> torch.Tensor:
        """Float32 [B]: the score at the last counted token."""
        return at_end(self.scalar(batch).values_BT, batch)

    @torch.no_grad()
    def score_text(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], *,
        truncated: Sequence[bool] | None = None, count: Callable[[Work], None] | None = None,
    ) -> list[float]:  # fmt: skip
        """Scores of responses as text, through this model's own template; old turns are dropped to fit.

        truncated: which responses the length limit cut (None: none); they get no eos, as they had none. count: told the
        work of every microbatch.
        """
        rows = []
        for messages, response, cut in zip(prompts, responses, truncated or [False] * len(responses), strict=True):
            answer = render_response(self.tokenizer, response)[: self.max_length - 8]
            answer = answer[:-1] if cut and len(answer) > 1 else answer
            fitted = fit_prompt(self.tokenizer, messages, self.max_length - len(answer))
            prompt = render_prompt(self.tokenizer, fitted or messages[-1:])[-(self.max_length - len(answer)) :]
            rows.append((prompt, answer))
        return self.score_rows(rows, count)

    def score_rows(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], count: Callable[[Work], None] | None = None
    ) -> list[float]:
        """Scores of (prompt ids, response ids), in token-budget microbatches."""
        score_B = torch.zeros(len(rows))
        device = str(self.scalar.device)

        def cut(part: list[int]) -> list[list[int]]:
            sides = [[rows[i][side] for i in part] for side in (0, 1)]
            return self.scalar.microbatches(*sides, budget=self.tokens_per_microbatch)

        for members, weight in world.passes([len(prompt) + len(response) for prompt, response in rows], cut):
            batch = token_batch([rows[i][0] for i in members], [rows[i][1] for i in members], device=device)
            if count is not None:
                count(self.scalar.work(batch))
            scores = self.score_ids(batch).cpu()
            if weight:
                score_B[members] = scores
        world.fill(score_B)
        return self.expect_numbers(score_B).tolist()

    def expect_numbers(self, score_B: torch.Tensor) -> torch.Tensor:
        """The scores as they are; NaN or infinity among them is a SetupError."""
        wrong = torch.nonzero(~torch.isfinite(score_B)).flatten().tolist()
        if wrong:
            raise SetupError(
                f"reward {self.name}: found {score_B[wrong[0]].item()} as the score of response {wrong[0]} (such "
                f"scores: {len(wrong)} of {len(score_B)}), expected finite numbers. Its weights are damaged, or its "
                "states too large for its precision: --compute.dtype float32 tells which"
            )
        return score_B

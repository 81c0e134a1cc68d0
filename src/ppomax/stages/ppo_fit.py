"""Whether the data of a PPO run fits its players, found before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ppomax.data.chat import render_prompt
from ppomax.models.players import Player
from ppomax.rewards.model import RewardModel
from ppomax.stages.inputs import Tokens, context_limit, one_of_each_roles
from ppomax.stages.players import Players
from ppomax.types import Prompt, SetupError


def expect_fitting(players: Players, prompt_ids: Sequence[Sequence[int]], ptx: Sequence[Tokens], longest: int) -> None:
    """Refuse sequences beyond the positions of a model that reads ids, and ids beyond its embedding.

    longest: tokens of the longest prompt and response.
    """
    roles: dict[str, Player | None] = {
        "policy": players.policy, "reference": players.reference, "critic": players.critic,
        **{f"reward {t.name}": t.reward.scalar for t in players.terms
           if isinstance(t.reward, RewardModel) and t.reward.reads_ids},
    }  # fmt: skip
    for role, player in roles.items():
        if player is not None:
            context_limit(player.model, longest, f"{role}: longest prompt + response")
            _expect_rows(player, prompt_ids, f"{role}: prompts")
    if ptx:
        context_limit(players.policy.model, max(len(row.ids) for row in ptx), "ptx_data: longest dialogue")
        _expect_rows(players.policy, (row.ids for row in ptx), "ptx_data")


def _expect_rows(player: Player, sequences: Iterable[Sequence[int]], what: str) -> None:
    largest, rows = max(map(max, sequences)), player.base.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise SetupError(
            f"{what}: found token id {largest}, expected less than {rows}, the rows of the model's embedding: its "
            "tokenizer has more tokens than the model"
        )


def expect_readable(players: Players, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that the chat template of a reward model that reads text does."""
    tried = one_of_each_roles(prompts)
    for term in players.terms:
        if not isinstance(term.reward, RewardModel) or term.reward.reads_ids:
            continue
        for prompt in tried:
            try:
                render_prompt(term.reward.tokenizer, prompt.messages)
            except SetupError as error:
                start = prompt.messages[-1]["content"][:60]
                raise SetupError(f"reward {term.name}, prompt {start!r} (source {prompt.source}): {error}") from None

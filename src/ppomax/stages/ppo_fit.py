"""Whether the data of a PPO run fits its players, found before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ppomax.data.chat import render_prompt
from ppomax.models.players import Player
from ppomax.rewards.model import RewardModel
from ppomax.stages.inputs import Tokens, context_limit, one_of_each_roles
from ppomax.stages.players import Players
from ppomax.types import Prompt, Rollout, SetupError


def expect_fitting(players: Players, prompt_ids: Sequence[Sequence[int]], ptx: Sequence[Tokens], longest: int) -> None:
    """Refuse sequences beyond the positions of a model that reads ids, and ids beyond its embedding.

    longest: tokens of the longest prompt and response.
    """
    for role, player in _reading_ids(players).items():
        context_limit(player.model, longest, f"{role}: longest prompt + response")
        _expect_rows(player, prompt_ids, f"{role}: prompts")
    if ptx:
        context_limit(players.policy.model, max(len(row.ids) for row in ptx), "ptx_data: longest dialogue")
        _expect_rows(players.policy, (row.ids for row in ptx), "ptx_data")


def expect_known(players: Players, rollout: Rollout) -> None:
    """Refuse a sampled id that another player has no embedding for. Models may have more rows than their tokenizer has
    tokens, and by chance a policy samples one that no token uses."""
    largest = int(rollout.response_ids_BR.max())
    for role, player in _reading_ids(players).items():
        if largest >= (rows := _rows(player)):
            raise SetupError(
                f"{role}: found {rows} embeddings, expected more than {largest}, an id that the policy sampled. Its "
                "vocabulary is padded further than its tokenizer's; give both models as many rows (transformers' "
                "resize_token_embeddings)"
            )


def _reading_ids(players: Players) -> dict[str, Player]:
    """Everybody who reads the policy's ids, by role."""
    found = {"policy": players.policy, "reference": players.reference, "critic": players.critic}
    for term in players.terms:
        if isinstance(term.reward, RewardModel) and term.reward.reads_ids:
            found[f"reward {term.name}"] = term.reward.scalar
    return {role: player for role, player in found.items() if player is not None}


def _rows(player: Player) -> int:
    return player.base.get_input_embeddings().weight.shape[0]


def _expect_rows(player: Player, sequences: Iterable[Sequence[int]], what: str) -> None:
    largest, rows = max(map(max, sequences)), _rows(player)
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

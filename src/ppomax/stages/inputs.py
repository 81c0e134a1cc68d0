"""Rows of data as token ids, with what was dropped counted; shared by the stages."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ppomax.config import ModelConfig, SamplingConfig
from ppomax.data.chat import fit_prompt, render_dialogue, render_prompt, render_response
from ppomax.data.readers import ReadReport, read_prompts
from ppomax.engine.checkpoint import file_hash
from ppomax.models.load import Compute, model_directory, resolve_compute
from ppomax.models.lora import Lora
from ppomax.models.players import Player, Policy
from ppomax.rollout.collect import Sampling, eos_token_ids, stop_check
from ppomax.rollout.sampler import Distribution
from ppomax.types import DataError, Dialogue, Message, Pair, Prompt, SetupError


@dataclass(frozen=True)
class Tokens:
    """Ids of one row and which of them count in the loss."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]


@dataclass(frozen=True)
class RankedTokens:
    """All responses to one prompt as ids, which is better than which (`pairs` of (better, worse)) and by how much."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int], ...]
    source: str
    gaps: tuple[float | None, ...] = ()
    messages: tuple[Message, ...] = ()
    key: str = ""
    weight: float = 1.0

    def __len__(self) -> int:
        return sum(len(self.prompt) + len(response) for response in self.responses)

    @property
    def best(self) -> list[int]:
        """The responses that are preferred to another and lose to none."""
        winners, losers = ({pair[side] for pair in self.pairs} for side in (0, 1))
        return sorted(winners - losers) or sorted(winners)


@dataclass(frozen=True)
class PromptRows:
    """Prompts and their ids, what was read, and a sentence about what was dropped and shortened."""

    prompts: list[Prompt]
    ids: list[tuple[int, ...]]
    report: ReadReport
    fitted: str

    def __str__(self) -> str:
        return f"{self.report}; {self.fitted}"


def required(specs: Sequence[str], flag: str, expected: str) -> list[str]:
    """The specs as a list; none given is an error that names the flag."""
    if not specs:
        raise SetupError(f"--{flag}: found nothing, expected {expected}")
    return list(specs)


def compute_of(config: ModelConfig) -> Compute:
    """Device and precision of a stage."""
    return resolve_compute(config.device, config.dtype)


def expect_native(sampling: SamplingConfig) -> None:
    """Refuse another sampler where only the native one is used."""
    if sampling.engine != "native":
        raise SetupError(
            f"sampling.engine: found {sampling.engine}, expected native; only `ppomax ppo` has another one"
        )


def sampling_of(config: SamplingConfig, policy: Policy, tokenizer: Any) -> Sampling:
    """How a stage samples from a policy."""
    return Sampling(
        limit=config.max_new_tokens,
        distribution=Distribution(config.temperature, config.top_p, config.top_k, config.repetition_penalty),
        eos_ids=eos_token_ids(policy.model, tokenizer),
        max_rows=config.max_rows,
        max_tokens=config.max_cache_tokens,
        stop=stop_check(tokenizer, config.stop),
    )


def training_of(config: ModelConfig, seed: int) -> dict[str, Any]:
    """A player's arguments that say what of it is trained, and how."""
    lora = None if config.lora_rank is None else Lora(config.lora_rank, config.lora_alpha, seed)
    return {"train_layers": config.train_layers, "checkpointing": config.gradient_checkpointing, "lora": lora}


def trained_of(player: Player) -> str:
    """How much of a player is trained, for the plan."""
    trained = sum(parameter.numel() for parameter in player.trained_parameters().values())
    return f"{trained:,} of {sum(parameter.numel() for parameter in player.model.parameters()):,} parameters"


def dialogue_tokens(tokenizer: Any, dialogues: Sequence[Dialogue], max_length: int) -> tuple[list[Tokens], str]:
    """Dialogues that have something to learn within `max_length`, and a sentence about what was cut or left out."""
    rows, empty, cut = [], 0, 0
    for dialogue in dialogues:
        ids, mask = render_dialogue(tokenizer, dialogue, max_length)
        cut += len(ids) == max_length
        # The first token has no state before it, so it cannot count.
        if any(mask[1:]):
            rows.append(Tokens(tuple(ids), tuple(mask)))
        else:
            empty += 1
    if not rows:
        raise DataError(f"no dialogue has an answer within {max_length} tokens; raise max_length or check the data")
    return rows, f"{cut} cut at {max_length} tokens, {empty} left out because no answer fits"


@dataclass
class _Ranking:
    """A prompt while its pairs are read: the responses with their numbers, the gap of every (better, worse)."""

    messages: tuple[Message, ...]
    key: str
    weight: float
    responses: dict[tuple[int, ...], int] = field(default_factory=dict)
    gaps: dict[tuple[int, int], float | None] = field(default_factory=dict)


def ranked_tokens(tokenizer: Any, pairs: Sequence[Pair], max_length: int) -> tuple[list[RankedTokens], str]:
    """Pairs by prompt, so that each response is read once and all pairs of a prompt stay together (InstructGPT).

    A pair fits if its prompt and longer answer do; old turns go first, then the pair is left out and counted.
    """
    grouped: dict[tuple[str, tuple[int, ...]], _Ranking] = {}
    left_out = shortened = repeated = 0
    for pair in pairs:
        sides = [tuple(render_response(tokenizer, text)) for text in (pair.chosen, pair.rejected)]
        room = max_length - max(map(len, sides))
        fitted = fit_prompt(tokenizer, pair.prompt, room) if room > 0 else None
        if fitted is None:
            left_out += 1
            continue
        shortened += len(fitted) < len(pair.prompt)
        prompt = tuple(render_prompt(tokenizer, fitted))
        ranking = grouped.setdefault((pair.source, prompt), _Ranking(tuple(fitted), pair.key, pair.weight))
        better, worse = (ranking.responses.setdefault(side, len(ranking.responses)) for side in sides)
        repeated += (better, worse) in ranking.gaps
        ranking.gaps[better, worse] = pair.gap
    rows = [
        RankedTokens(
            prompt, tuple(r.responses), tuple(r.gaps), source, tuple(r.gaps.values()), r.messages, r.key, r.weight
        )
        for (source, prompt), r in grouped.items()
    ]
    if not rows:
        raise DataError(f"none of {len(pairs)} pairs fits into {max_length} tokens; raise max_length")
    report = f"{left_out} longer than {max_length} tokens left out, {shortened} lost old turns"
    return rows, report + (f", {repeated} repeated pairs dropped" if repeated else "")


def fitted_prompts(tokenizer: Any, specs: Sequence[str], max_tokens: int) -> PromptRows:
    """Prompts of at most `max_tokens` ids, whole or without their oldest turns."""
    prompts, report = read_prompts(list(specs))
    kept: list[Prompt] = []
    ids: list[tuple[int, ...]] = []
    shortened = 0
    for prompt in prompts:
        fitted = fit_prompt(tokenizer, prompt.messages, max_tokens)
        if fitted is None:
            continue
        shortened += len(fitted) < len(prompt.messages)
        kept.append(replace(prompt, messages=tuple(fitted)))
        ids.append(tuple(render_prompt(tokenizer, fitted)))
    if not kept:
        raise DataError(f"none of {len(prompts)} prompts fits into {max_tokens} tokens; raise max_prompt_tokens")
    dropped = len(prompts) - len(kept)
    fitted = f"{dropped} longer than {max_tokens} tokens dropped, {shortened} lost old turns"
    return PromptRows(kept, ids, report, fitted)


def weights_hash(name: str) -> str:
    """A fingerprint of a model directory's weights; a hub name stands for itself."""
    folder = Path(model_directory(name))
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return name
    return hashlib.sha256("".join(file_hash(file) for file in files).encode()).hexdigest()


def expect_same_weights(role: str, name: str, saved: str) -> None:
    """Refuse to go on with a frozen model that is not the one the run began with."""
    if weights_hash(name) != saved:
        raise SetupError(f"{role} {name}: its weights changed since the run began; restore them or start with --fresh")


def context_limit(model: Any, needed: int, what: str) -> None:
    """Refuse sequences longer than the model's positions."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and needed > longest:
        raise SetupError(f"{what}: {needed} tokens, but the model has positions for {longest}; lower the limits")

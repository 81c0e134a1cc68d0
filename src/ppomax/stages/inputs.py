"""Rows of data as token ids, with what was dropped counted; shared by the stages."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import try_to_load_from_cache

from ppomax.config import ModelConfig, SamplingConfig
from ppomax.data.chat import fit_dialogue, fit_prompt, render_dialogue, render_prompt, render_response
from ppomax.data.readers import ReadReport, read_prompts
from ppomax.engine import world
from ppomax.engine.checkpoint import file_hash
from ppomax.engine.durable import size_text
from ppomax.engine.optimiser import local
from ppomax.models.load import Compute, context_length, model_directory, resolve_compute
from ppomax.models.lora import Lora
from ppomax.models.players import Player, Policy
from ppomax.rollout.collect import Sampling, eos_token_ids, stop_check
from ppomax.rollout.sampler import Distribution
from ppomax.types import DataError, Dialogue, Message, Pair, Prompt, SetupError

_ADDRESS = re.compile(" at 0x[0-9a-fA-F]+(?=>)")


@dataclass(frozen=True)
class Tokens:
    """Ids of one row and which of them count in the loss."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]


def fingerprint(*parts: Iterable[tuple[Sequence[int], object]]) -> str:
    """16 hex digits that tell rows of data apart, their order too; a row is its ids and whatever else matters of it.

    Where an object (an image, say) is shown by its address, which is another one in every process, that is left out.
    """
    digest = hashlib.sha256()
    for rows in parts:
        for ids, rest in rows:
            shown = _ADDRESS.sub("", repr(rest)).encode("utf-8", "backslashreplace")
            digest.update(np.asarray(ids, dtype=np.int64).tobytes() + shown)
        digest.update(b"end of part")
    return digest.hexdigest()[:16]


def of_dialogues(rows: Iterable[Tokens]) -> Iterable[tuple[Sequence[int], object]]:
    """Rows of dialogues for `fingerprint`."""
    return ((row.ids, sum(row.mask)) for row in rows)


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
    """Device and precision of a stage; `auto` is the same precision in all processes."""
    compute = resolve_compute(config.device, config.dtype)
    found = {str(one.dtype).removeprefix("torch.") for one in world.gathered(compute)}
    if len(found) > 1:
        raise SetupError(
            f"compute.dtype: auto is {' and '.join(sorted(found))} on these machines, expected one precision for all; "
            "say which, e.g. --compute.dtype float32"
        )
    return compute


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


def memory_of(players: Iterable[Player], training: int, kept: int = 0) -> str:
    """What this process holds from its first step on, for the plan. training: bytes beside the weights; kept: those of
    states of frozen layers."""
    parameters = [local(p) for p in {id(p): p for player in players for p in player.parameters()}.values()]
    weights = sum(p.numel() * p.element_size() for p in parameters)
    parts = {"weights": weights, "masters, moments, gradients": training, "states of frozen layers": kept}
    held = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
    each = " in each process" if world.size() > 1 else ""
    return f"{size_text(weights + training + kept)}{each} ({held})"


def dialogue_tokens(
    tokenizer: Any, dialogues: Sequence[Dialogue], max_length: int, *, what: str = "dialogues"
) -> tuple[list[Tokens], str]:
    """Dialogues that have something to learn within `max_length`, and a sentence about what was cut or left out.

    Old exchanges go first; what is too long even so is cut on the right. what: their name where none is left.
    """
    rows, empty, cut, shortened = [], 0, 0, 0
    for dialogue in dialogues:
        ids, mask = render_dialogue(tokenizer, dialogue, max_length + 1)
        if len(ids) > max_length and len(dialogue.messages) > 2:
            fitted = fit_dialogue(tokenizer, dialogue, max_length)
            shortened += len(fitted.messages) < len(dialogue.messages)
            ids, mask = render_dialogue(tokenizer, fitted, max_length + 1)
        cut += len(ids) > max_length
        row = Tokens(tuple(ids[:max_length]), tuple(mask[:max_length]))
        # The first token has no state before it, so it cannot count.
        if any(row.mask[1:]):
            rows.append(row)
        else:
            empty += 1
    if not rows:
        found = f"none of {len(dialogues)} {what} has an answer within {max_length} tokens"
        raise DataError(f"{found}; raise max_length or check the data")
    fate = f"{shortened} lost old turns, {cut} cut at {max_length} tokens"
    return rows, f"{fate}, {empty} left out because no answer fits"


def ranked_tokens(
    tokenizer: Any, pairs: Sequence[Pair], max_length: int, *, what: str = "pairs"
) -> tuple[list[RankedTokens], str]:
    """Pairs by prompt, so that each response is read once and all pairs of a prompt stay together (InstructGPT).

    A response fits if what is left of the prompt does beside it. Old turns go first, for all responses of a prompt
    alike, then pairs with responses that are too long; pairs that say the opposite of each other go both.
    A prompt that several files give weighs what the heaviest of them says. what: the pairs' name where none is left.
    """
    by_prompt: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault((pair.source, pair.key), []).append(pair)
    rows = []
    dropped = Counter(longer=0, shortened=0, repeated=0, opposed=0, silent=0)
    for (source, key), group in by_prompt.items():
        texts = dict.fromkeys(text for pair in group for text in (pair.chosen, pair.rejected))
        ids = {text: tuple(render_response(tokenizer, text)) for text in texts}
        spoken = [p for p in group if tokenizer.eos_token not in (p.chosen.strip(), p.rejected.strip())]
        kept, messages = _fitting(tokenizer, spoken, ids, max_length)
        gaps = {(ids[pair.chosen], ids[pair.rejected]): pair.gap for pair in kept}
        agreed = {sides: gap for sides, gap in gaps.items() if sides[::-1] not in gaps}
        dropped.update(
            silent=len(group) - len(spoken), longer=len(spoken) - len(kept), repeated=len(kept) - len(gaps),
            opposed=len(gaps) - len(agreed), shortened=len(kept) * (len(messages) < len(group[0].prompt)),
        )  # fmt: skip
        if agreed:
            number = {side: i for i, side in enumerate(dict.fromkeys(side for sides in agreed for side in sides))}
            rows.append(RankedTokens(
                tuple(render_prompt(tokenizer, messages)), tuple(number),
                tuple((number[better], number[worse]) for better, worse in agreed), source, tuple(agreed.values()),
                messages, key, max(pair.weight for pair in group),
            ))  # fmt: skip
    report = f"{dropped['longer']} longer than {max_length} tokens left out, {dropped['shortened']} lost old turns"
    for count, fate in (
        (dropped["repeated"], "repeated pairs dropped"),
        (dropped["opposed"], "pairs dropped because others say the opposite"),
        (dropped["silent"], "pairs dropped because a response is only the eos"),
    ):
        report += f", {count} {fate}" if count else ""
    if not rows:
        raise DataError(f"none of {len(pairs)} {what} is left ({report}); raise max_length or check the data")
    return rows, report


def _fitting(
    tokenizer: Any, pairs: Sequence[Pair], ids: Mapping[str, Sequence[int]], max_length: int
) -> tuple[list[Pair], tuple[Message, ...]]:
    """Those pairs of one prompt that fit, and the newest part of the prompt that fits beside all of their responses."""
    kept = list(pairs)
    while kept:
        longest = max(len(ids[text]) for pair in kept for text in (pair.chosen, pair.rejected))
        room = max_length - longest
        messages = fit_prompt(tokenizer, kept[0].prompt, room) if room > 0 else None
        if messages is not None:
            return kept, messages
        kept = [pair for pair in kept if max(len(ids[pair.chosen]), len(ids[pair.rejected])) < longest]
    return [], ()


def fitted_prompts(tokenizer: Any, specs: Sequence[str], max_tokens: int) -> PromptRows:
    """Prompts of at most `max_tokens` ids, whole or without their oldest turns."""
    prompts, report = read_prompts(list(specs), tokenizer)
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
    # A reward that takes a column gets it with every batch, also where none of its rows has it.
    columns = dict.fromkeys(name for prompt in kept for name in prompt.columns)
    kept = [replace(prompt, columns={**columns, **prompt.columns}) for prompt in kept]
    dropped = len(prompts) - len(kept)
    fitted = f"{dropped} longer than {max_tokens} tokens dropped, {shortened} lost old turns"
    return PromptRows(kept, ids, report, fitted)


def weights_hash(name: str) -> str:
    """A fingerprint of a model directory's weights; a hub name has that of the commit that is in the cache."""
    folder = Path(model_directory(name))
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        with suppress(ValueError):  # no name that the hub could have
            if isinstance(cached := try_to_load_from_cache(name, "config.json"), str):
                return f"{name}@{Path(cached).parent.name}"
        return name
    return hashlib.sha256("".join(file_hash(file) for file in files).encode()).hexdigest()


def expect_same_weights(role: str, name: str, saved: str) -> None:
    """Refuse to go on with a frozen model that is not the one the run began with."""
    found = weights_hash(name)
    if saved == name and found.startswith(f"{name}@"):  # of a run from before commits were kept
        return
    if found == name != saved:  # it was a directory, and here looks like a hub name
        raise SetupError(f"{role} {name}: no such directory here; give the command in the folder where the run began")
    if found != saved:
        raise SetupError(f"{role} {name}: its weights changed since the run began; restore them or start with --fresh")


def one_of_each_roles(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt of each sequence of roles: chat templates go by the roles, so these tell what one refuses."""
    return [*{tuple(m["role"] for m in prompt.messages): prompt for prompt in reversed(prompts)}.values()]


def context_limit(model: Any, needed: int, what: str) -> None:
    """Refuse sequences longer than the model's positions."""
    longest = context_length(model)
    if longest is not None and needed > longest:
        raise SetupError(f"{what}: {needed} tokens, but the model has positions for {longest}; lower the limits")

"""The four players as modules that we own: token ids in; log-probs, entropies or values out.

Parameters are read only inside `forward`, because tied or sharded weights break when they are read from outside.
Every player computes float32 results from response positions only; no [B, T, V] float tensor exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ppomax.data.batches import padded_batches, prompt_batches
from ppomax.models.attention import PACKING_TOLERANCE, SLACK, is_causal, near, packed_states, packing_is_exact
from ppomax.models.few_rows import weight_first
from ppomax.models.flops import Cost, Costs, batch_work, pass_tokens, stack_costs
from ppomax.models.layers import lower_view, split_is_exact, upper_view
from ppomax.models.load import decoder_stack, scalar_head
from ppomax.models.logprobs import Unembedded, token_entropy, token_kl, token_logprobs, token_statistics
from ppomax.models.lora import Lora, add_adapters
from ppomax.models.recompute import recompute_layers
from ppomax.types import SetupError, TokenBatch, Work


@dataclass(frozen=True)
class TokenScores:
    """Float32 [B, T]: entry t is about token t given the tokens before it; 0 where not asked for.

    logprobs at the sampling temperature; entropy of the same distribution and its exact KL to another policy's;
    plain_logprobs at temperature 1; other_logprobs those of that other policy, at the sampling temperature.
    """

    logprobs_BT: Tensor
    entropy_BT: Tensor | None = None
    plain_logprobs_BT: Tensor | None = None
    kl_BT: Tensor | None = None
    other_logprobs_BT: Tensor | None = None


class Player(nn.Module):
    """A decoder stack, of which only the uppermost `train_layers` are trained if that is given; `lora`: by adapters."""

    fewest_layers = 1
    # Whether its layers are compiled (models/compiled.py).
    compiled = False

    def __init__(
        self, model: nn.Module, *, train_layers: int | None, trained: bool, checkpointing: bool = False,
        lora: Lora | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.base: Any = decoder_stack(model)
        self.train_layers = train_layers
        model.requires_grad_(False)
        if train_layers is not None:
            count = len(getattr(self.base, "layers", ()))
            if count and not self.fewest_layers <= train_layers <= count:
                raise SetupError(
                    f"train_layers: found {train_layers}, expected {self.fewest_layers} to {count} (the model's layers)"
                )
            if not split_is_exact(self.base, count - train_layers):
                raise SetupError(f"train_layers: {type(model).__name__} cannot be split into layers; leave it None")
        # Where passes are made; shards may live elsewhere.
        self.device = next(model.parameters()).device
        self.packs = packing_is_exact(self.base)
        if not self.packs and not is_causal(self.base):
            raise SetupError(
                f"{type(model).__name__}: found states that depend on later tokens, expected a decoder that reads "
                "from left to right; this is not supported"
            )
        # Where processes share the parameters (models/shard.py): all of them, gathered for the time of a block.
        self.gathered: Callable[[], AbstractContextManager[None]] = nullcontext
        if trained:
            self._unfreeze(lora)
        if checkpointing and trained:
            recompute_layers(model)

    def _unfreeze(self, lora: Lora | None) -> None:
        count = len(getattr(self.base, "layers", ()))
        first = 0 if self.train_layers is None else count - self.train_layers
        if lora is not None and self.train_layers == 0:
            raise SetupError(
                f"lora_rank: found {lora.rank} with train_layers 0, which trains the head alone; leave one of them out"
            )
        if lora is not None:
            if not count:
                raise SetupError(
                    f"lora_rank: found {lora.rank} with {type(self.model).__name__}, which has no list of decoder "
                    "layers to put adapters into; leave it None"
                )
            add_adapters(self.model, self.base, lora, first_layer=first)
        elif self.train_layers is None:
            self.model.requires_grad_(True)
        elif self.train_layers > 0:
            self.base.layers[first:].requires_grad_(True)
            self.base.norm.requires_grad_(True)

    def trunk(self, batch: TokenBatch) -> Tensor:
        """States [B, T, H] above the frozen lower layers, without gradient."""
        assert self.train_layers is not None
        with torch.no_grad():
            return self._states(lower_view(self.base, len(self.base.layers) - self.train_layers), batch, None)

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Last hidden states [B, T, H], after the final norm; those of padding are not to be looked at."""
        if self.train_layers is None:
            return self._states(self.base, batch, None)
        trunk = batch.trunk_BTH if batch.trunk_BTH is not None else self.trunk(batch)
        return self._states(upper_view(self.base, len(self.base.layers) - self.train_layers), batch, trunk)

    def _states(self, stack: Any, batch: TokenBatch, below_BTH: Tensor | None) -> Tensor:
        """States [B, T, H] above a stack of layers that reads the ids or, if they are given, the states below it."""
        name, x = ("input_ids", batch.ids_BT) if below_BTH is None else ("inputs_embeds", below_BTH)
        if not self.packs:
            return stack(**{name: x}, use_cache=False).last_hidden_state
        packing = batch.packing
        states_NH = packed_states(stack, packing, **{name: x.flatten(0, 1).index_select(0, packing.source_N)[None]})
        return states_NH.index_select(0, packing.place_BT.flatten()).view(*packing.place_BT.shape, -1)

    def microbatches(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, budget: int
    ) -> list[list[int]]:
        """Row indices of microbatches with at most `budget` tokens of what this player computes, padding included."""
        if self.packs:
            return prompt_batches(prompts, responses, budget=budget)
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        return padded_batches(lengths, budget=budget, overhead=pass_tokens(self.base, self.device))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimiser moves, by name in the Hugging Face model."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @cached_property
    def costs(self) -> Costs:
        """Floating-point operations of this player's passes, the reading of its head included."""
        split = 0 if self.train_layers is None else len(self.base.layers) - self.train_layers
        token_weights, place_weights = self._heads()
        return stack_costs(self.base, split=split, token_weights=token_weights, place_weights=place_weights)

    def _heads(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights that read every token, and those that read the tokens that are asked for."""
        raise NotImplementedError

    def work(self, batch: TokenBatch, *, training: bool = False, places: int | None = None) -> Work:
        """What a pass over a batch has to do, with `training` its backward pass too; counted once either way.

        places: tokens whose log-probs are asked for; by default a policy's are the response tokens, a scalar's none.
        """
        cost = self.costs.forward + (self.costs.backward if training else Cost())
        if batch.trunk_BTH is None:
            cost += self.costs.trunk
        return batch_work(cost, batch, packs=self.packs, places=places)

    def trunk_work(self, batch: TokenBatch) -> Work:
        """What `trunk` has to do."""
        return batch_work(self.costs.trunk, batch, packs=self.packs, places=0)


class Policy(Player):
    """Policy or reference: log-probs of given tokens."""

    def __init__(
        self, model: nn.Module, *, train_layers: int | None, trained: bool, checkpointing: bool = False,
        lora: Lora | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, train_layers=train_layers, trained=trained, checkpointing=checkpointing, lora=lora)
        if not head_is_linear(model, self.base):
            raise SetupError(f"{type(model).__name__} changes its logits after the unembedding; this is not supported")
        # Whether the native sampler can go on from what it has read.
        self.samples_natively = self._goes_on()

    def forward(
        self, batch: TokenBatch, *, mask_BT: Tensor | None = None, temperature: float = 1.0, statistics: bool = False,
        entropy: bool = False, against: Policy | None = None, both: bool = False,
    ) -> TokenScores:  # fmt: skip
        """Log-probs of the tokens under `mask_BT` (default: the response tokens), logits divided by `temperature`.

        statistics: no gradient, but also the exact entropy over the vocabulary and the log-probs at temperature 1.
        entropy: the entropy with its gradient. against: the exact KL to another policy, with the gradient in this one.
        both: that policy's log-probs too.
        """
        places = _Places.of(response_mask(batch) if mask_BT is None else mask_BT, batch)
        states = self._unembedded(batch, places)
        scores = _token_scores(states, places, temperature, statistics)
        if entropy:
            exact = token_entropy(states.states_NH, states.weight_VH, states.bias_V, temperature=temperature)
            scores = replace(scores, entropy_BT=places.spread(exact))
        if against is not None:
            with torch.no_grad():
                other = against._unembedded(batch, places)
                theirs = _token_scores(other, places, temperature, statistics=False) if both else None
            scores = replace(
                scores, kl_BT=places.spread(token_kl(states, other, temperature=temperature)),
                other_logprobs_BT=None if theirs is None else theirs.logprobs_BT,
            )  # fmt: skip
        return scores

    def _heads(self) -> tuple[list[Tensor], list[Tensor]]:
        return [], [self.model.get_output_embeddings().weight]  # type: ignore[operator]

    def _unembedded(self, batch: TokenBatch, places: _Places) -> Unembedded:
        return self.unembed(self.hidden(batch)[places.rows, places.before])

    def unembed(self, states_NH: Tensor) -> Unembedded:
        """Last hidden states, and what turns them into logits."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        return Unembedded(states_NH, head.weight, head.bias)

    def response_logits(self, batch: TokenBatch, *, temperature: float) -> Tensor:
        """Float32 logits [N, V] of all response tokens, by plain products that can be differentiated twice (TRPO)."""
        states = self._unembedded(batch, _Places.of(response_mask(batch), batch))
        return F.linear(states.states_NH, states.weight_VH, states.bias_V).float() / temperature

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """All parameters at hand while responses are sampled: processes decode different numbers of tokens."""
        as_written = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with self.gathered(), weight_first(self.model), as_written:
            yield

    def next_states(self, ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor, cache: Any) -> Tensor:
        """Hidden states [B, H] at the last of `ids_BT`, given what `cache` holds (decoding)."""
        if not self.samples_natively:
            raise SetupError(
                f"{type(self.model).__name__}: found no keys and values for each layer and token to go on from, "
                "expected a transformer with such a cache; this architecture cannot be sampled from"
            )
        return self._read_on(ids_BT, mask_BS, position_BT, cache)

    def _read_on(self, ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor, cache: Any) -> Tensor:
        out = self.base(
            input_ids=ids_BT, attention_mask=mask_BS, position_ids=position_BT, past_key_values=cache, use_cache=True
        )  # fmt: skip
        return out.last_hidden_state[:, -1]

    @torch.no_grad()
    def _goes_on(self) -> bool:
        """Whether a token after prompts of unequal lengths has the state that its row alone gives it: a trial."""
        rows = [torch.tensor([row], device=self.device) for row in ([1, 2, 3, 4], [5, 6])]
        padded = torch.tensor([[1, 2, 3, 4], [5, 5, 5, 6]], device=self.device)
        at = torch.tensor([[0, 1, 2, 3], [-2, -1, 0, 1]], device=self.device)
        mask, cache = (at >= 0).long(), DynamicCache()
        try:
            self._read_on(padded[:, :-1], mask[:, :-1], at[:, :-1].clamp(min=0), cache)
            if len(cache.layers) != self.base.config.num_hidden_layers or not all(map(_keeps_tokens, cache.layers)):
                return False
            found = self._read_on(padded[:, -1:], mask, at[:, -1:], cache)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False
        alone = [self.base(input_ids=row, use_cache=False).last_hidden_state[0, -1] for row in rows]
        return near(found, torch.stack(alone), slack=SLACK)


@dataclass(frozen=True)
class ScalarOutput:
    """values_BT: float32, the scalar read at every token. logprobs_BT: the LM term's, where asked for."""

    values_BT: Tensor
    logprobs_BT: Tensor | None = None


class Scalar(Player):
    """Reward model or critic: one scalar per token, float32. With `train_layers` 0 its head alone is trained."""

    fewest_layers = 0

    def __init__(
        self, model: nn.Module, *, train_layers: int | None, trained: bool, checkpointing: bool = False,
        lora: Lora | None = None, unembedding: nn.Linear | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, train_layers=train_layers, trained=trained, checkpointing=checkpointing, lora=lora)
        self.head = scalar_head(model)
        self.head.requires_grad_(trained)
        self.unembedding = unembedding

    def forward(self, batch: TokenBatch, *, lm_mask_BT: Tensor | None = None) -> ScalarOutput:
        """The scalar at every token and, under `lm_mask_BT`, the tokens' log-probs from the same trunk (eq. 2's p')."""
        hidden = self.hidden(batch)
        bias = None if self.head.bias is None else self.head.bias.float()
        values = F.linear(hidden.float(), self.head.weight.float(), bias)[..., 0]
        if lm_mask_BT is None:
            return ScalarOutput(values)
        places = _Places.of(lm_mask_BT, batch)
        bias = None if self.unembedding is None else self.unembedding.bias
        states = Unembedded(hidden[places.rows, places.before], self._lm_weight(), bias)
        return ScalarOutput(values, _token_scores(states, places, 1.0, statistics=False).logprobs_BT)

    def _lm_weight(self) -> Tensor:
        return self.unembedding.weight if self.unembedding is not None else self.base.get_input_embeddings().weight

    def _heads(self) -> tuple[list[Tensor], list[Tensor]]:
        return [self.head.weight], [self._lm_weight()]

    def work(self, batch: TokenBatch, *, training: bool = False, places: int | None = None) -> Work:
        """As for every player; log-probs are read where the LM term asks for them."""
        return super().work(batch, training=training, places=places or 0)


def response_mask(batch: TokenBatch) -> Tensor:
    """Bool [B, T]: True on the response tokens."""
    t = torch.arange(batch.ids_BT.shape[1], device=batch.ids_BT.device)[None, :]
    return (t >= batch.prompt_length_B[:, None]) & (t < batch.length_B[:, None])


def at_responses(x_BT: Tensor, batch: TokenBatch, *, before: bool = False) -> Tensor:
    """[B, R] entries of the response tokens; `before`: of the state before each of them. 0 where masked."""
    r = torch.arange(batch.response_width, device=x_BT.device)[None, :]
    index = (batch.prompt_length_B[:, None] + r - int(before)).clamp(max=x_BT.shape[1] - 1)
    picked = x_BT.gather(1, index)
    return torch.where(batch.mask_BR, picked, torch.zeros_like(picked))


def at_end(x_BT: Tensor, batch: TokenBatch) -> Tensor:
    """[B] entries at the last counted token: where the score of a response is defined."""
    return x_BT.gather(1, batch.length_B[:, None] - 1)[:, 0]


@dataclass(frozen=True)
class _Places:
    """The N tokens that are asked for: token t of a row is read from the state at `before` = t - 1."""

    rows: Tensor
    before: Tensor
    targets: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, mask_BT: Tensor, batch: TokenBatch) -> _Places:
        """The masked tokens t ≥ 1 of a batch."""
        rows, before = torch.nonzero(mask_BT[:, 1:], as_tuple=True)
        return cls(rows, before, batch.ids_BT[rows, before + 1], batch.ids_BT.shape)

    def spread(self, x_N: Tensor) -> Tensor:
        """[B, T]: the numbers at their tokens, 0 elsewhere."""
        empty = torch.zeros(self.shape, dtype=torch.float32, device=x_N.device)
        return empty.index_put((self.rows, self.before + 1), x_N)


def _token_scores(states: Unembedded, places: _Places, temperature: float, statistics: bool) -> TokenScores:
    parts = states.states_NH, states.weight_VH, states.bias_V, places.targets
    if not statistics:
        return TokenScores(places.spread(token_logprobs(*parts, temperature=temperature)))
    logprobs, entropy, plain = map(places.spread, token_statistics(*parts, temperature=temperature))
    return TokenScores(logprobs, entropy, plain)


def expect_equal_rows(policy: Policy, other: Policy, *, what: str, instead: str) -> None:
    """Refuse an exact KL between vocabularies of different sizes: models of one tokenizer may differ in the rows that
    pad it, and probability that one gives to such rows has no counterpart in the other.

    what: the setting that asks for the KL. instead: what would do without it.
    """
    rows, found = (p.model.get_output_embeddings().weight.shape[0] for p in (policy, other))  # type: ignore[operator]
    if found != rows:
        raise SetupError(
            f"{what}: found {found} rows in its unembedding, expected {rows} as in the policy's: the exact KL is over "
            f"all of them; {instead}"
        )


@torch.inference_mode()
def head_is_linear(model: nn.Module, base: Any) -> bool:
    """Whether the logits are hidden states times the unembedding and nothing else (no soft cap, no scale)."""
    ids = torch.arange(1, 5, device=next(model.parameters()).device)[None, :]
    head = model.get_output_embeddings()  # type: ignore[operator]
    # A cap far above the logits of an untrained model leaves no trace in them.
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        return False
    expected = F.linear(base(input_ids=ids, use_cache=False).last_hidden_state, head.weight, head.bias).float()
    found = model(input_ids=ids, use_cache=False).logits.float()
    if not bool(torch.isfinite(found).all()):
        name = getattr(model, "name_or_path", "") or type(model).__name__
        raise SetupError(f"{name}: found logits that are no numbers, expected finite ones: its weights are damaged")
    tolerance = min(1e-2, PACKING_TOLERANCE[head.weight.dtype])
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def _keeps_tokens(layer: Any) -> bool:
    return isinstance(layer, DynamicLayer) and layer.keys is not None

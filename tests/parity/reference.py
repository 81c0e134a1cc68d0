"""PPO-max written a second time, slowly: one response at a time, plain transformers, float64, no code of ppomax.

Numbers per token are Python floats in loops; only model outputs and gradients are tensors. The only inputs from a run
are what it drew: the sampled ids, which rows form a minibatch, in which order, and where adapters start. Sources:
docs/ppo-max.md and, for AdamW, the papers named there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

PRECISION = torch.float64


@dataclass(frozen=True)
class Response:
    """One sampled response: its prompt's ids, its own, and whether the length limit cut it."""

    prompt: list[int]
    ids: list[int]
    truncated: bool


@dataclass(frozen=True)
class Settings:
    """What one run is set to. truncated: `score` or `bootstrap`; layers: how many of the uppermost are trained."""

    temperature: float
    kl_coefficient: float
    score_clip: float
    truncated: str
    gamma: float
    gae_lambda: float
    clip_ratio: float
    value_clip: float
    whiten: bool
    ptx_weight: float
    pretrain_iterations: int
    policy_steps: int
    layers: int | None


@dataclass(frozen=True)
class AdamWSettings:
    """One player's: peak rate, share of warm-up, floor of the cosine, AdamW's numbers, bound of the gradient's norm."""

    lr: float
    warmup: float
    floor: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_norm: float


@dataclass
class Estimates:
    """Per response one list, one number per token; `values` has one more, V of the state after the last token."""

    scores: list[float] = field(default_factory=list)
    old: list[list[float]] = field(default_factory=list)
    reference: list[list[float]] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    advantages: list[list[float]] = field(default_factory=list)
    returns: list[list[float]] = field(default_factory=list)


@dataclass
class Step:
    """What one optimiser step saw: its losses, counts out of `tokens`, and the gradients' norms before the clip."""

    tokens: int
    policy_loss: float = 0.0
    value_loss: float = 0.0
    ptx_loss: float = 0.0
    clipped_ratios: int = 0
    clipped_values: int = 0
    norms: dict[str, float] = field(default_factory=dict)


def token_logprobs(model: Any, prompt: list[int], ids: list[int], temperature: float) -> list[Tensor]:
    """log pi(a_t | s_t) of every response token, from full logits: those at position i are about token i + 1."""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0]
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return [logprobs[len(prompt) + t - 1, token] for t, token in enumerate(ids)]


def state_values(model: Any, prompt: list[int], ids: list[int]) -> list[Tensor]:
    """The scalar head's output before every response token, and after the last one: n + 1 numbers."""
    states = model.model(torch.tensor([[*prompt, *ids]])).last_hidden_state[0]
    return [model.score(states[len(prompt) + t - 1])[0] for t in range(len(ids) + 1)]


def response_score(model: Any, prompt: list[int], ids: list[int]) -> float:
    """The reward model's number at the last response token."""
    return float(state_values(model, prompt, ids)[-1])


def deviation(numbers: Sequence[float]) -> float:
    """The biased standard deviation."""
    centre = math.fsum(numbers) / len(numbers)
    return math.sqrt(math.fsum((x - centre) ** 2 for x in numbers) / len(numbers))


def normalised(score: float, history: Sequence[float], clip: float) -> float:
    """clip((score - mean) / std, -clip, clip) over all scores so far, this batch's included (eq. 18)."""
    return min(max((score - math.fsum(history) / len(history)) / deviation(history), -clip), clip)


def whitened(rows: list[list[float]]) -> list[list[float]]:
    """Zero mean and unit variance over all tokens of the rows."""
    numbers = [x for row in rows for x in row]
    centre, scale = math.fsum(numbers) / len(numbers), deviation(numbers)
    return [[(x - centre) / scale for x in row] for row in rows]


def gae(rewards: list[float], values: list[float], gamma: float, gae_lambda: float) -> list[float]:
    """A_t = delta_t + gamma lambda A_{t+1}; `values` has V of the end in its last place."""
    advantages, following = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        following = rewards[t] + gamma * values[t + 1] - values[t] + gamma * gae_lambda * following
        advantages[t] = following
    return advantages


def learning_rate(step: int, steps: int, optim: AdamWSettings) -> float:
    """Linear to the peak over the first n steps, then a cosine from there to floor x peak at the last step."""
    rising = round(optim.warmup * steps)
    if step < rising:
        return optim.lr * (step + 1) / rising
    share = (step - rising) / (steps - rising - 1)
    return optim.lr * (optim.floor + (1 - optim.floor) * (1 + math.cos(math.pi * share)) / 2)


class AdamW:
    """Kingma and Ba (2015) with decoupled decay, on the named parameters of one player."""

    def __init__(self, parameters: dict[str, Tensor], settings: AdamWSettings) -> None:
        self.parameters, self.settings, self.taken = parameters, settings, 0
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clip the whole gradient's norm, move, forget the gradient; returns the norm before clipping."""
        s, self.taken = self.settings, self.taken + 1
        norm = math.sqrt(math.fsum(float(p.grad.square().sum()) for p in self.parameters.values()))
        factor = min(1.0, s.max_norm / (norm + 1e-6))  # torch's clip_grad_norm_ has this offset too
        for name, p in self.parameters.items():
            gradient = p.grad * factor
            self.first[name] = s.betas[0] * self.first[name] + (1 - s.betas[0]) * gradient
            self.second[name] = s.betas[1] * self.second[name] + (1 - s.betas[1]) * gradient**2
            mean = self.first[name] / (1 - s.betas[0] ** self.taken)
            square = self.second[name] / (1 - s.betas[1] ** self.taken)
            # Matrices only: no norms, embeddings, nor the single row of a scalar head.
            decay = s.weight_decay if p.ndim == 2 and "embed" not in name and "score" not in name else 0.0
            p.copy_(p - lr * decay * p - lr * mean / (square.sqrt() + s.eps))
            p.grad = None
        return norm


class LowRank(nn.Module):
    """A weight W as W + scale·B·A (Hu et al., 2021); B starts at 0."""

    def __init__(self, weight: Tensor, start_A: Tensor, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.A = nn.Parameter(start_A.to(PRECISION, copy=True))
        self.B = nn.Parameter(torch.zeros(len(weight), len(start_A), dtype=PRECISION))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.B @ self.A


class Run:
    """The four models of a run, the two optimisers and the history of scores: `estimate` a rollout, then `update`."""

    def __init__(
        self, settings: Settings, policy: str, reference: str, reward: str, ptx: list[list[dict[str, str]]],
        optims: dict[str, AdamWSettings], adapters: dict[str, dict[str, tuple[Tensor, float]]],
    ) -> None:  # fmt: skip
        """adapters: by player and linear map, where A starts and the scale; empty: the weights themselves are trained."""

        def load(kind: Any, path: str) -> Any:
            model = kind.from_pretrained(path, dtype=PRECISION).eval()
            # Else torch drops the gradient of reading the pad id, which is the end of turn here (trap 2).
            model.get_input_embeddings().padding_idx = None
            return model

        self.settings = settings
        self.policy, self.reference = load(AutoModelForCausalLM, policy), load(AutoModelForCausalLM, reference)
        self.reward, self.critic = (load(AutoModelForSequenceClassification, reward) for _ in range(2))
        models = {"policy": self.policy, "critic": self.critic}
        for name, starts in adapters.items():
            for layer, (start, scale) in starts.items():
                module = models[name].get_submodule(layer)
                parametrize.register_parametrization(module, "weight", LowRank(module.weight, start, scale))
        self.ptx = [_counted(AutoTokenizer.from_pretrained(policy), messages) for messages in ptx]
        self.optimisers = {
            name: AdamW(_trained(model, settings.layers, adapted=bool(adapters)), optims[name])
            for name, model in models.items()
        }
        self.history: list[float] = []

    def update(
        self, index: int, responses: list[Response], estimates: Estimates, minibatches: list[list[int]]
    ) -> list[Step]:
        """One step of each player per minibatch, epochs in a row; while the critic is pre-trained, of it alone."""
        s, alone, steps = self.settings, index < self.settings.pretrain_iterations, []
        for rows in minibatches:
            step = Step(tokens=sum(len(responses[b].ids) for b in rows))
            rates = {name: optimiser.settings.lr for name, optimiser in self.optimisers.items()}
            if not alone:
                done = (index - s.pretrain_iterations) * len(minibatches) + len(steps)
                rates = {n: learning_rate(done, s.policy_steps, o.settings) for n, o in self.optimisers.items()}
                self.policy_gradient(responses, estimates, rows, step)
                self.ptx_gradient(step)
                step.norms["policy"] = self.optimisers["policy"].step(rates["policy"])
            self.critic_gradient(responses, estimates, rows, step, clip=math.inf if alone else s.value_clip)
            step.norms["critic"] = self.optimisers["critic"].step(rates["critic"])
            steps.append(step)
        return steps

    def estimate(self, responses: list[Response], *, first: bool) -> Estimates:
        """Scores, log-probs and values, then rewards, advantages and returns of every response."""
        s, e = self.settings, Estimates()
        scored = [not (r.truncated and s.truncated == "bootstrap") for r in responses]
        with torch.no_grad():
            e.scores = [response_score(self.reward, r.prompt, r.ids) for r in responses]
            self.history += [score for score, counts in zip(e.scores, scored, strict=True) if counts]
            if first:  # the critic's start predicts raw scores: bring it to their new unit
                self.critic.score.weight.div_(deviation(self.history))
            for r, score, counts in zip(responses, e.scores, scored, strict=True):
                old = _floats(token_logprobs(self.policy, r.prompt, r.ids, s.temperature))
                reference = _floats(token_logprobs(self.reference, r.prompt, r.ids, s.temperature))
                values = _floats(state_values(self.critic, r.prompt, r.ids))
                rewards = [-s.kl_coefficient * (a - b) for a, b in zip(old, reference, strict=True)]
                if counts:
                    values[-1] = 0.0
                    rewards[-1] += normalised(score, self.history, s.score_clip)
                advantages = gae(rewards, values, s.gamma, s.gae_lambda)
                e.old.append(old)
                e.reference.append(reference)
                e.values.append(values)
                e.rewards.append(rewards)
                e.advantages.append(advantages)
                e.returns.append([a + v for a, v in zip(advantages, values, strict=False)])
        return e

    def policy_gradient(self, responses: list[Response], e: Estimates, rows: list[int], step: Step) -> None:
        """-sum min(ratio A, clip(ratio) A) / tokens of the minibatch, one response at a time."""
        s, epsilon = self.settings, self.settings.clip_ratio
        advantages = [e.advantages[b] for b in rows]
        for b, row in zip(rows, whitened(advantages) if s.whiten else advantages, strict=True):
            loss: Any = 0.0
            logprobs = token_logprobs(self.policy, responses[b].prompt, responses[b].ids, s.temperature)
            for logprob, old, advantage in zip(logprobs, e.old[b], row, strict=True):
                ratio = torch.exp(logprob - old)
                plain, bounded = ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage
                loss = loss - (plain if plain.item() <= bounded.item() else bounded)
                step.clipped_ratios += abs(ratio.item() - 1) > epsilon
            (loss / step.tokens).backward()
            step.policy_loss += loss.item() / step.tokens

    def ptx_gradient(self, step: Step) -> None:
        """lambda x mean NLL over the assistant's tokens of all dialogues, added to the same gradient."""
        tokens = sum(sum(counts) for _, counts in self.ptx)
        for ids, counts in self.ptx:
            logprobs = token_logprobs(self.policy, ids[:1], ids[1:], 1.0)
            loss = -sum(logprob for logprob, counted in zip(logprobs, counts[1:], strict=True) if counted) / tokens
            (self.settings.ptx_weight * loss).backward()
            step.ptx_loss += loss.item()

    def critic_gradient(
        self, responses: list[Response], e: Estimates, rows: list[int], step: Step, *, clip: float
    ) -> None:
        """sum of the larger squared error, of V and of V held within `clip` of its old value, / tokens."""
        for b in rows:
            loss: Any = 0.0
            values = state_values(self.critic, responses[b].prompt, responses[b].ids)
            for value, old, target in zip(values, e.values[b], e.returns[b], strict=False):
                held = value.clamp(old - clip, old + clip)
                plain, bounded = (value - target) ** 2, (held - target) ** 2
                loss = loss + (plain if plain.item() >= bounded.item() else bounded)
                step.clipped_values += bounded.item() > plain.item()
            (loss / step.tokens).backward()
            step.value_loss += loss.item() / step.tokens


def snapshot(model: Any) -> dict[str, Tensor]:
    """Every parameter in float64, those of adapters by their names in PEFT."""
    return {_in_peft(name): p.detach().to(PRECISION, copy=True) for name, p in model.named_parameters()}


def _in_peft(name: str) -> str:
    layer, found, part = name.partition(".parametrizations.weight.")
    if not found:
        return name
    return f"{layer}.base_layer.weight" if part == "original" else f"{layer}.lora_{part[-1]}.default.weight"


def _trained(model: Any, layers: int | None, *, adapted: bool) -> dict[str, Tensor]:
    """All parameters, those of the uppermost layers, the final norm and the scalar head, or adapters and that head."""
    if adapted:
        ends = (".A", ".B", "score.weight")
        return {name: p for name, p in model.named_parameters() if name.endswith(ends)}
    last = model.config.num_hidden_layers
    names = tuple(f"model.layers.{i}." for i in range(last - (layers or 0), last))
    return {
        name: p
        for name, p in model.named_parameters()
        if layers is None or name.startswith((*names, "model.norm.", "score."))
    }


def _counted(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """A dialogue's ids, and which of them the assistant wrote, its end of turn included."""

    def ids(part: list[dict[str, str]], cue: bool) -> list[int]:
        return tokenizer.apply_chat_template(part, add_generation_prompt=cue, tokenize=True, return_dict=False)

    whole = ids(messages, False)
    counts = [False] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = len(ids(messages[:i], True)), len(ids(messages[: i + 1], False))
            counts[start:end] = [True] * (end - start)
    return whole, counts


def _floats(tensors: list[Tensor]) -> list[float]:
    return [float(x) for x in tensors]

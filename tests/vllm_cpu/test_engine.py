"""A real vLLM against the trainer: the same log-probs, the weights of now, ids as they were sampled, repeatable."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from models.architectures import EOS, FLOAT32, ragged
from torch import Tensor

from ppomax.engine.randomness import seeds_for, uniforms_for
from ppomax.models.load import load_causal_lm
from ppomax.models.lora import Lora
from ppomax.models.players import Policy, at_responses
from ppomax.rollout.collect import Sampling, collect
from ppomax.rollout.sampler import Distribution, Sampled, sample
from ppomax.rollout.vllm import VLLM
from ppomax.types import Message, Prompt, SetupError, token_batch
from vllm_cpu.conftest import llama

# Float32 sums in another order.
TOLERANCE = 2e-4
LIMIT = 12
PROMPTS = ragged(rows=5, seed=2)[0]
SEEDS = [11, 12, 13, 14, 15]


def sampled(engine: VLLM, policy: Policy, *, seeds: Sequence[int] = SEEDS, temperature: float = 0.7) -> list[Sampled]:
    return engine.sample(
        policy, PROMPTS[: len(seeds)], seeds, limit=LIMIT, distribution=Distribution(temperature), eos_ids=[EOS]
    )


def largest_gap(policy: Policy, responses: list[Sampled], temperature: float = 0.7) -> float:
    """Between what the sampler says and what the policy reads."""
    return max(float((a - b).abs().max()) for a, b in both(policy, responses, temperature))


def both(policy: Policy, responses: list[Sampled], temperature: float) -> list[tuple[Tensor, Tensor]]:
    batch = token_batch(PROMPTS[: len(responses)], [r.ids for r in responses])
    with torch.no_grad():
        own_BR = at_responses(policy(batch, temperature=temperature).logprobs_BT, batch)
    return [(own_BR[b, : len(r.ids)], torch.tensor(r.logprobs)) for b, r in enumerate(responses)]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_its_log_probs_are_of_the_tempered_distribution(engine: VLLM, policy: Policy, temperature: float) -> None:
    responses = sampled(engine, policy, temperature=temperature)
    assert largest_gap(policy, responses, temperature) < TOLERANCE
    assert largest_gap(policy, responses, temperature * 1.1) > 50 * TOLERANCE
    assert engine.check(policy, PROMPTS, temperature) < TOLERANCE


def test_nearly_greedy_it_says_what_the_native_sampler_says(engine: VLLM, policy: Policy) -> None:
    cold = Distribution(0.01)
    with torch.no_grad():  # no two logits so near each other that chance decides
        policy.base.norm.weight.mul_(50)
    uniforms_BR = uniforms_for(0, 0, range(5), [0] * 5, LIMIT)
    native = sample(policy, PROMPTS, uniforms_BR, distribution=cold, eos_ids=[EOS], max_rows=8)
    responses = sampled(engine, policy, temperature=0.01)
    assert [r.ids for r in responses] == [r.ids for r in native]
    assert len({tuple(r.ids) for r in responses}) > 1


def test_it_samples_with_the_weights_of_now(engine: VLLM, policy: Policy) -> None:
    before = sampled(engine, policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.2)
    assert largest_gap(policy, before) > 0.05
    after = sampled(engine, policy)
    assert largest_gap(policy, after) < TOLERANCE
    with torch.no_grad():  # one matrix among many, and a gain
        policy.base.layers[1].mlp.down_proj.weight.neg_()
        policy.base.norm.weight.mul_(0.5)
    assert largest_gap(policy, after) > 0.05
    assert largest_gap(policy, sampled(engine, policy)) < TOLERANCE


def test_no_key_of_older_weights_is_used_again(engine: VLLM, policy: Policy) -> None:
    """A prompt of more than a block, which the prefix cache keeps."""
    prompt = [PROMPTS[0][i % len(PROMPTS[0])] for i in range(150)]

    def gap() -> float:
        (r,) = engine.sample(policy, [prompt], [5], limit=LIMIT, distribution=Distribution(), eos_ids=[])
        batch = token_batch([prompt], [r.ids])
        with torch.no_grad():
            own_BR = at_responses(policy(batch).logprobs_BT, batch)
        return float((own_BR[0] - torch.tensor(r.logprobs)).abs().max())

    assert gap() < TOLERANCE
    with torch.no_grad():
        policy.base.layers[0].self_attn.v_proj.weight.neg_()
    assert gap() < TOLERANCE


def test_adapters_are_merged(engine: VLLM, directory: str) -> None:
    pytest.importorskip("peft")
    adapted = Policy(load_causal_lm(directory, FLOAT32), train_layers=1, trained=True, lora=Lora(rank=2, alpha=4))
    plain = largest_gap(adapted, sampled(engine, adapted))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
    changed = sampled(engine, adapted)
    assert max(plain, largest_gap(adapted, changed)) < TOLERANCE
    bare = Policy(load_causal_lm(directory, FLOAT32), train_layers=None, trained=False)
    assert largest_gap(bare, changed) > 50 * TOLERANCE


def test_a_response_ends_at_its_eos_or_at_the_limit(engine: VLLM, policy: Policy) -> None:
    ends = list(range(0, 259, 9))
    responses = engine.sample(
        policy, PROMPTS * 4, range(20), limit=LIMIT, distribution=Distribution(1.5), eos_ids=ends
    )  # fmt: skip
    assert 0 < sum(r.truncated for r in responses) < 20
    for r in responses:
        assert len(r.ids) == len(r.logprobs) <= LIMIT
        assert not set(r.ids[:-1]) & set(ends)
        assert r.truncated == (r.ids[-1] not in ends)
        assert len(r.ids) == LIMIT or not r.truncated


def test_a_seed_names_a_response_whatever_its_neighbours(engine: VLLM, policy: Policy) -> None:
    first = sampled(engine, policy)
    assert sampled(engine, policy) == first
    alone = [engine_alone(engine, policy, i) for i in range(5)]
    assert [r.ids for r in alone] == [r.ids for r in first]
    others = sampled(engine, policy, seeds=[seed + 100 for seed in SEEDS])
    assert all(a.ids != b.ids for a, b in zip(first, others, strict=True))


def engine_alone(engine: VLLM, policy: Policy, i: int) -> Sampled:
    (response,) = engine.sample(
        policy, [PROMPTS[i]], [SEEDS[i]], limit=LIMIT, distribution=Distribution(0.7), eos_ids=[EOS]
    )  # fmt: skip
    return response


def test_tokens_come_as_often_as_they_should(engine: VLLM, policy: Policy) -> None:
    """First tokens of many samples of one prompt: the mean log-prob is minus the entropy, within four errors of it."""
    n = 512
    responses = engine.sample(
        policy, [PROMPTS[0]] * n, seeds_for(3, 0, [0] * n, range(n)), limit=1, distribution=Distribution(), eos_ids=[]
    )  # fmt: skip
    with torch.no_grad():
        logits = policy.model(torch.tensor([PROMPTS[0]])).logits[0, -1]  # type: ignore[operator]
    logprobs = logits.log_softmax(-1)
    mean = float((logprobs.exp() * logprobs).sum())
    deviation = float((logprobs.exp() * (logprobs - mean).square()).sum()) ** 0.5
    found = sum(r.logprobs[0] for r in responses) / n
    assert abs(found - mean) < 4 * deviation / math.sqrt(n)
    likeliest = int(logprobs.argmax())
    share, p = sum(r.ids[0] == likeliest for r in responses) / n, float(logprobs[likeliest].exp())
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_collect_returns_the_same_rollout_as_with_the_native_sampler(engine: VLLM, policy: Policy) -> None:
    prompts = [Prompt((Message(role="user", content=letter),), key=letter) for letter in "abcde"]
    ids = [tuple(prompt) for prompt in PROMPTS]
    how = Sampling(LIMIT, Distribution(0.7), [EOS], max_rows=8)
    settings = {"samples": 2, "iteration": 3, "seed": 7, "how": how}
    native = collect(policy, prompts, ids, [4, 0, 2], **settings)
    seen: list[int] = []
    rollout = collect(policy, prompts, ids, [4, 0, 2], **settings, engine=engine, progress=seen.append)
    assert (rollout.prompts, rollout.prompt_ids) == (native.prompts, native.prompt_ids)
    assert rollout.sample_B.tolist() == native.sample_B.tolist() == [0, 1] * 3
    assert seen == [6]
    part = collect(policy, prompts, ids, [4, 0, 2], **settings, engine=engine, part=slice(2, 4))
    assert part.responses() == rollout.responses()[2:4]
    assert rollout.responses()[0] != rollout.responses()[1]


def test_the_global_generators_stay_where_they_were(engine: VLLM, policy: Policy) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    sampled(engine, policy)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    assert before == after


def test_an_engine_that_computes_something_else_is_refused(engine: VLLM, tmp_path: Path) -> None:
    """The same shapes, but positions turn at another speed than the engine was started with."""
    other = llama(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 3.0})
    with pytest.raises(SetupError, match=r"vLLM .* and the trainer differ by .* nats .*LlamaForCausalLM"):
        engine.check(Policy(load_causal_lm(other, FLOAT32), train_layers=None, trained=False), PROMPTS, 0.3)

"""Families of decoders: supported ones give plain transformers' numbers, the others a clear error, none a wrong one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from models.architectures import FLOAT32, batch_of, make_model, policy, ragged, reloaded, save_model, saved_once, scalar
from ppomax.engine.randomness import uniforms_for
from ppomax.models.layers import split_is_exact
from ppomax.models.load import export, load_causal_lm, load_tokenizer
from ppomax.models.players import Policy, at_responses, head_is_linear
from ppomax.rollout.sampler import Distribution, sample
from ppomax.types import SetupError, token_batch

TOLERANCE = 2e-5
WHOLE = ["llama-untied", "qwen2", "qwen2-window", "mistral", "gpt2", "gpt-neox", "gemma3"]
OTHERS = ["starcoder2", "opt", "phimoe", "bloom", "falcon", "gemma3-images"]
SPLIT = ["llama-untied", "qwen2", "mistral", "gemma3"]
NOT_SPLIT = ["qwen2-window", "gpt2", "gpt-neox"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The directory of a family's small model, made once."""
    return saved_once(tmp_path_factory.mktemp)


def assert_plain_logprobs(player: Policy, folder: str) -> None:
    """The player's log-probs of a long ragged batch are those of transformers, row by row."""
    prompts, responses = ragged(rows=3, seed=4)
    prompts[0] = prompts[0] * 5  # longer than the windows
    batch = token_batch(prompts, responses)
    found = at_responses(player(batch).logprobs_BT, batch)
    plain = reloaded(AutoModelForCausalLM, folder)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1)[range(len(response)), response]
        torch.testing.assert_close(found[i, : len(response)].detach(), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", WHOLE + OTHERS)
def test_policies_have_the_logprobs_of_transformers(directory: Callable[[str], str], name: str) -> None:
    player = policy(directory(name), trained=True, checkpointing=True)
    assert_plain_logprobs(player, directory(name))
    player(batch_of()).logprobs_BT.sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in player.trained_parameters().values())


@pytest.mark.parametrize("name", SPLIT)
def test_policies_that_can_be_split_give_the_same(directory: Callable[[str], str], name: str) -> None:
    whole, split = policy(directory(name)), policy(directory(name), train_layers=1, trained=True)
    assert_plain_logprobs(split, directory(name))
    batch = batch_of()
    assert torch.equal(split(batch.with_trunk(split.trunk(batch))).logprobs_BT, whole(batch).logprobs_BT)


@pytest.mark.parametrize("name", NOT_SPLIT)
def test_policies_that_cannot_be_split_say_so(directory: Callable[[str], str], name: str) -> None:
    for player in (policy, scalar):
        with pytest.raises(SetupError, match=r"train_layers: \w+ cannot be split into layers; leave it None"):
            player(directory(name), train_layers=1)


def test_a_window_that_a_few_tokens_do_not_show_is_not_called_exact() -> None:
    # The split would give the uppermost layer the attention of the lowest, unseen in the eight tokens that are tried.
    assert not split_is_exact(make_model("qwen2-window").model, 2)
    assert split_is_exact(make_model("qwen2").model, 2)


@pytest.mark.parametrize("name", WHOLE + OTHERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trap_07_scalar_players_read_every_family_without_dropout(
    directory: Callable[[str], str], name: str, checkpointing: bool
) -> None:
    player, batch = scalar(directory(name), trained=True, checkpointing=checkpointing), batch_of()
    plain = AutoModelForSequenceClassification.from_pretrained(directory(name), num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        plain.score.weight.copy_(player.head.weight)
        for i in range(len(batch.ids_BT)):
            ids = batch.ids_BT[i : i + 1, : int(batch.length_B[i])]
            expected = plain.eval()(ids, attention_mask=torch.ones_like(ids)).logits[0, 0]
            found = player(batch).values_BT[i, ids.shape[1] - 1]
            assert float(found) == pytest.approx(float(expected), abs=TOLERANCE)
    player(batch).values_BT.sum().backward()
    assert bool(player.head.weight.grad.any())


@pytest.mark.parametrize("name", WHOLE + OTHERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trap_08_every_family_samples_with_the_logprobs_it_scores(
    directory: Callable[[str], str], name: str, checkpointing: bool
) -> None:
    player = policy(directory(name), trained=True, checkpointing=checkpointing)
    prompts, _ = ragged(rows=4, seed=2)
    prompts[1] = prompts[1] * 4  # longer than the windows, beside short ones
    drawn = sample(
        player, prompts, uniforms_for(3, 0, range(4), [0] * 4, 18), distribution=Distribution(0.6), eos_ids=[2],
        max_rows=4,
    )  # fmt: skip
    assert sum(len(s.ids) for s in drawn) > 40
    batch = token_batch(prompts, [s.ids for s in drawn])
    scored = at_responses(player(batch, temperature=0.6).logprobs_BT, batch)
    for row, s in zip(scored.tolist(), drawn, strict=True):
        assert row[: len(s.ids)] == pytest.approx(s.logprobs, abs=TOLERANCE)


def test_capped_logits_are_refused_whatever_their_size() -> None:
    model = make_model("gemma2-logit-cap")
    with torch.inference_mode():
        quiet = model(torch.tensor([[3, 4]])).logits
    assert float(quiet.abs().max()) < 0.5 * model.config.final_logit_softcapping, "the cap barely shows here"
    assert not head_is_linear(model, model.model)
    model.config.final_logit_softcapping = None
    assert head_is_linear(model, model.model)
    with pytest.raises(SetupError, match="Gemma2ForCausalLM changes its logits after the unembedding"):
        Policy(make_model("gemma2-logit-cap"), train_layers=None, trained=False)


@pytest.mark.parametrize("factor", [0.9, 1.1, 1.001])
def test_scaled_logits_are_refused_even_if_small(factor: float) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(1e-3)
    assert head_is_linear(model, model.model)
    model.register_forward_hook(lambda module, given, out: out.__setitem__("logits", out.logits * factor))
    assert not head_is_linear(model, model.model)


def test_capped_attention_is_refused(tmp_path: Path) -> None:
    folder = save_model("gemma2", tmp_path)
    with pytest.raises(SetupError, match=re.escape("its attention needs softcap")):
        scalar(folder)(batch_of())
    model = load_causal_lm(folder, FLOAT32)
    with pytest.raises(SetupError):
        Policy(model, train_layers=None, trained=False)


@pytest.mark.parametrize("name", ["starcoder2", "opt", "phimoe", "bloom", "gpt-neox"])
def test_trap_07_recomputed_layers_give_the_same_bits_whatever_a_family_calls_its_dropout(
    directory: Callable[[str], str], name: str
) -> None:
    plain, thrifty = (scalar(directory(name), trained=True, checkpointing=option) for option in (False, True))
    batch = batch_of()
    expected = plain(batch).values_BT
    for _ in range(2):
        assert torch.equal(thrifty(batch).values_BT, expected)
    for player in (plain, thrifty):
        player(batch).values_BT.sum().backward()
    for (key, a), b in zip(thrifty.trained_parameters().items(), plain.trained_parameters().values(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-5, msg=key)


def test_of_a_model_for_images_the_text_part_is_trained_and_exported(
    directory: Callable[[str], str], tmp_path: Path
) -> None:
    player = policy(directory("gemma3-images"), trained=True)
    assert not player.packs, "its windows are longer than the few tokens that are tried"
    assert not any("vision" in name for name in player.trained_parameters())
    export(player.model, load_tokenizer("tiny"), tmp_path)
    assert_plain_logprobs(policy(str(tmp_path)), directory("gemma3-images"))
    assert type(reloaded(AutoModelForCausalLM, tmp_path)).__name__ == "Gemma3ForCausalLM"


def test_logits_that_are_scaled_by_a_little_are_refused(directory: Callable[[str], str]) -> None:
    with pytest.raises(SetupError, match="GraniteForCausalLM changes its logits"):
        policy(directory("granite"))


def test_models_that_see_later_tokens_are_refused(directory: Callable[[str], str]) -> None:
    with pytest.raises(SetupError, match="BertLMHeadModel: found states that depend on later tokens"):
        policy(directory("bert"))


@pytest.mark.parametrize("name", ["mamba", "openai-gpt"])
def test_models_without_keys_and_values_are_read_and_not_sampled_from(
    directory: Callable[[str], str], name: str
) -> None:
    player = policy(directory(name))
    assert_plain_logprobs(player, directory(name))
    with pytest.raises(SetupError, match=r"\w+: found no keys and values .* cannot be sampled from"):
        sample(
            player, [[3, 4], [5]], uniforms_for(3, 0, range(2), [0] * 2, 4), distribution=Distribution(), eos_ids=[2],
            max_rows=2,
        )  # fmt: skip


def test_layers_that_cannot_be_computed_again_are_refused(directory: Callable[[str], str]) -> None:
    with pytest.raises(SetupError, match="gradient_checkpointing: found OpenAIGPTLMHeadModel"):
        policy(directory("openai-gpt"), trained=True, checkpointing=True)

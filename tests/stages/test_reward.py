"""The reward model, whole: it learns a preference, its loss is eq. 2, and plain transformers reads its scores."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models.architectures import save_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ppomax.config import OptimConfig
from ppomax.data.chat import render_prompt, render_response
from ppomax.data.readers import read_pairs
from ppomax.data.split import split_by_key
from ppomax.models.load import export_scalar, load_causal_lm, load_scalar_lm, load_tokenizer
from ppomax.models.players import Policy, response_mask
from ppomax.stages.inputs import RankedTokens, compute_of, ranked_tokens
from ppomax.stages.reward import reward, reward_player
from ppomax.stages.reward_scoring import score_pairs
from ppomax.types import DataError, Pair, SetupError, token_batch
from stages.conftest import Toys, Trained
from stages.toy import (
    CALM,
    FLOAT32,
    distance,
    file_hashes,
    metrics,
    other_vocabulary,
    pair_rows,
    ranked_rows,
    reward_config,
    same_bits,
    weights,
    write_rows,
)

# All prompts in one optimiser step.
ONE_STEP: dict[str, Any] = {"tokens_per_batch": 10**9, "max_prompts": 300, "epochs": 1, "heldout": 0.0}


def token_rows(model: str, data: str) -> list[RankedTokens]:
    return ranked_tokens(load_tokenizer(model), read_pairs(data)[0], 1024)[0]


def scalar_loop(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Score at the last token and summed NLL of the answer: one unpadded row at a time, without our modules."""
    states = model.model(torch.tensor([[*prompt, *answer]])).last_hidden_state[0]
    score = states[-1] @ model.score.weight[0]
    logprobs = (states @ model.model.embed_tokens.weight.T).log_softmax(-1)
    first = len(prompt)
    return score, -sum(logprobs[first + i - 1, token] for i, token in enumerate(answer))


def test_it_learns_which_answer_wins_on_prompts_that_it_has_not_seen(trained: Trained) -> None:
    rows = metrics(trained.reward_run)
    first, last = rows[0], rows[-1]
    assert first["ranking_loss"] == pytest.approx(math.log(2), abs=0.15)
    assert last["heldout_accuracy"] >= 0.9
    assert last["ranking_loss"] < 0.45
    assert last["heldout_loss"] < 0.45


def test_the_summary_counts_what_was_held_out(trained: Trained, toys: Toys) -> None:
    result = reward(reward_config(trained.reward_run, trained.sft, toys.pairs))  # finished: the stored summary
    learn, heldout = split_by_key(read_pairs(toys.pairs)[0], 0.2, 0)
    assert (result["pairs"], result["heldout_pairs"]) == (len(learn), len(heldout))
    assert set(result["accuracy_by_source"]) == {pair.source for pair in heldout}
    by_source = [result["accuracy_by_source"][pair.source]["accuracy"] for pair in heldout]
    assert sum(by_source) / len(heldout) == pytest.approx(result["accuracy"])
    assert 0.3 < result["length_only_accuracy"] < 0.7 < result["accuracy"]
    assert sum(result["margin_histogram"]["counts"]) == sum(g["pairs"] for g in result["calibration"]) == len(heldout)
    assert result["fit_for_ppo"]["answer"] in ("yes", "with care")


def test_the_notable_pairs_are_written_with_the_score_at_every_token(trained: Trained, toys: Toys) -> None:
    rows = [
        json.loads(line) for line in (trained.reward_run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {row["kind"] for row in rows} >= {"right", "close"}
    texts = {(row["chosen"], row["rejected"]) for row in pair_rows()}
    model = AutoModelForSequenceClassification.from_pretrained(trained.reward)
    tokenizer = load_tokenizer(trained.reward)
    for row in rows:
        assert (row["chosen"], row["rejected"]) in texts
        prompt = render_prompt(tokenizer, row["prompt"])
        for side in ("chosen", "rejected"):
            answer = render_response(tokenizer, row[side])
            along = row[f"along_{side}"]
            assert len(along) == len(answer)
            assert along[-1] == pytest.approx(row[f"reward_{side}"], abs=1e-4)
            cut = torch.tensor([[*prompt, *answer[:3]]])
            with torch.no_grad():
                values = model.model(cut).last_hidden_state @ model.score.weight[0]
            assert along[2] == pytest.approx(float(values[0, -1]), abs=1e-3)
    right = [row["reward_chosen"] - row["reward_rejected"] for row in rows if row["kind"] == "right"]
    assert right == sorted(right, reverse=True) and min(right) > 0


def test_two_reward_models_are_compared_on_the_same_pairs(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    short = reward_config(tmp_path / "run", trained.sft, toys.pairs, max_steps=2, compare=trained.reward)
    found = reward(short)
    assert found["compared_with"]["model"] == trained.reward
    assert (
        found["compared_with"]["accuracy"]
        == reward(reward_config(trained.reward_run, trained.sft, toys.pairs))["accuracy"]
    )
    assert 0.0 < found["compared_with"]["agreement"] < 1.0
    itself = short.model_copy(update={"run_dir": tmp_path / "again", "compare": str(tmp_path / "run" / "final")})
    assert reward(itself)["compared_with"]["agreement"] == 1.0


def test_a_reward_model_of_another_vocabulary_is_not_compared(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    other = other_vocabulary(tmp_path / "other")
    with pytest.raises(SetupError, match="compare: .* has another vocabulary or chat template than"):
        reward(reward_config(tmp_path / "run", trained.sft, toys.pairs, compare=other))


@pytest.mark.parametrize("other", ["tiny", "template"])
def test_a_comparison_that_cannot_be_made_is_refused_before_the_first_step(
    other: str, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    if other == "template":
        export_scalar(
            load_scalar_lm(trained.reward, compute_of(FLOAT32)),
            load_tokenizer(trained.reward, "role-tags"),
            tmp_path / "o",
        )
        other = str(tmp_path / "o")
    config = reward_config(tmp_path / "run", trained.sft, toys.pairs, max_steps=2, compare=other)
    with pytest.raises(SetupError, match="score head|chat template"):
        reward(config)
    assert not (config.run_dir / "metrics.jsonl").exists()
    # Leaving it out is no other run.
    assert reward(config.model_copy(update={"compare": None}), resume=True)["steps"] == 2


def test_a_ranking_stays_together_when_old_turns_are_dropped(trained: Trained) -> None:
    turns = [{"role": r, "content": c * 12} for r, c in (("user", "old"), ("assistant", "so"))]
    prompt = [*turns, {"role": "user", "content": "Now?"}]
    pairs = [
        Pair(tuple(prompt), "a", text, "k", weight=w) for text, w in (("b", 1.0), ("c " * 20, 3.0), ("d" * 200, 1.0))
    ]
    tokenizer = load_tokenizer(trained.sft)
    whole = len(render_prompt(tokenizer, prompt))
    [row], report = ranked_tokens(tokenizer, pairs, whole + 20)
    assert len(row.responses) == 3 and row.pairs == ((0, 1), (0, 2)) and row.best == [0] and row.weight == 3.0
    assert [m["content"] for m in row.messages] == ["Now?"] and len(row.prompt) < whole
    assert report == f"1 longer than {whole + 20} tokens left out, 2 lost old turns"


def test_pairs_that_say_the_opposite_and_answers_of_nothing_but_eos_are_dropped_and_counted(trained: Trained) -> None:
    prompt = ({"role": "user", "content": "q"},)
    sides = [("a", "b"), ("b", "a"), ("a", "c"), ("a", "c"), ("d", "<|im_end|>")]
    rows, report = ranked_tokens(load_tokenizer(trained.sft), [Pair(prompt, *s, "k") for s in sides], 100)
    assert [(len(row.responses), row.pairs) for row in rows] == [(2, ((0, 1),))]
    for said in ("1 repeated", "2 pairs dropped because others say the opposite", "1 pairs dropped because a response"):
        assert said in report
    with pytest.raises(DataError, match="none of 2 pairs is left .*say the opposite"):
        ranked_tokens(load_tokenizer(trained.sft), [Pair(prompt, *s, "k") for s in sides[:2]], 100)


def test_the_loss_of_a_step_is_eq_2_of_the_untrained_model(trained: Trained, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "ranked.jsonl", ranked_rows())
    config = reward_config(tmp_path / "run", trained.sft, data, ranking_weight=0.5, lm_weight=2.0, **ONE_STEP)
    result = reward(config)
    (row,) = metrics(config.run_dir)
    model = reward_player(trained.sft, compute_of(FLOAT32), config, trained=True).model
    ranking = lm = tokens = 0.0
    hits: list[float] = []
    by_prompt: dict[str, list[dict[str, str]]] = {}
    for pair in ranked_rows():
        by_prompt.setdefault(pair["prompt"], []).append(pair)
    tokenizer = load_tokenizer(trained.sft)
    with torch.no_grad():
        for prompt, pairs in by_prompt.items():
            ids = render_prompt(tokenizer, [{"role": "user", "content": prompt}])
            texts = {pair[side] for pair in pairs for side in ("chosen", "rejected")}
            answers = {text: render_response(tokenizer, text) for text in texts}
            read = {text: scalar_loop(model, ids, answer) for text, answer in answers.items()}
            margins = [float(read[pair["chosen"]][0] - read[pair["rejected"]][0]) for pair in pairs]
            # Every prompt weighs the same, however many pairs it has; the LM term reads its best answer once.
            ranking += sum(math.log1p(math.exp(-m)) for m in margins) / len(pairs) / len(by_prompt)
            hits += [float(m > 0) for m in margins]
            best = max(texts, key=lambda text: text.count("e"))
            lm += float(read[best][1])
            tokens += len(answers[best])
    assert {len(pairs) for pairs in by_prompt.values()} == {1, 3, 6}
    assert row["pairs"] == result["pairs"] == len(hits)
    assert result["prompts"] == 15
    assert row["ranking_loss"] == pytest.approx(ranking, rel=1e-4)
    assert row["lm_loss"] == pytest.approx(lm / tokens, rel=1e-4)
    assert row["loss"] == pytest.approx(0.5 * ranking + 2.0 * lm / tokens, rel=1e-4)
    assert row["accuracy"] == pytest.approx(sum(hits) / len(hits), abs=1e-6)


def test_the_lm_term_moves_the_trunk_and_not_the_head(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    moved = {}
    sgd_like = OptimConfig(lr=1e-3, warmup=0.0, max_grad_norm=None)
    for weight in (None, 1.0):
        config = reward_config(
            tmp_path / str(weight), trained.sft, toys.pairs, lm_weight=weight, optim=sgd_like, **ONE_STEP
        )
        reward(config)
        moved[weight] = metrics(config.run_dir)[0], weights(config.run_dir / "final")
    without, within = moved[None], moved[1.0]
    assert "lm_loss" not in without[0]
    assert without[0]["loss"] == without[0]["ranking_loss"] == within[0]["ranking_loss"]
    assert within[0]["loss"] > without[0]["loss"] + 1
    assert within[0]["grad_norm"] > 1.05 * without[0]["grad_norm"]
    assert torch.equal(without[1]["score.weight"], within[1]["score.weight"])
    assert not torch.equal(without[1]["model.embed_tokens.weight"], within[1]["model.embed_tokens.weight"])


def test_frozen_layers_without_held_out_pairs_where_nothing_is_packed(toys: Toys, tmp_path: Path) -> None:
    """Here a model with windows; on GPUs, every model."""
    model, split = save_model("mistral", tmp_path / "model"), FLOAT32.model_copy(update={"train_layers": 1})
    config = reward_config(tmp_path / "run", model, toys.pairs, heldout=0.0, epochs=2, compute=split)
    assert reward(config)["steps"] == len(metrics(config.run_dir)) > 1


def test_the_lm_term_of_a_model_with_untied_embeddings(toys: Toys, tmp_path: Path) -> None:
    model = save_model("llama-untied", tmp_path / "untied")
    config = reward_config(tmp_path / "run", model, toys.pairs, heldout=0.0, max_steps=2)
    player = reward_player(model, compute_of(FLOAT32), config, trained=True)
    assert player.unembedding is not None
    assert not player.unembedding.weight.requires_grad  # nothing would ever step on its gradient
    reward(config)
    rows = metrics(config.run_dir)
    assert rows[0]["lm_loss"] > rows[1]["lm_loss"] > 0


def test_the_lm_term_reads_the_unembeddings_bias_and_refuses_what_is_no_unembedding(toys: Toys, tmp_path: Path) -> None:
    model = save_model("phi", tmp_path / "phi")
    config = reward_config(tmp_path / "run", model, toys.pairs)
    player = reward_player(model, compute_of(FLOAT32), config, trained=True)
    policy = Policy(load_causal_lm(model, compute_of(FLOAT32)), train_layers=None, trained=False)
    batch = token_batch([[1, 5, 6]], [[7, 8, 9, 2]])
    assert float(policy.model.lm_head.bias.abs().max()) > 0.1
    expected = policy(batch).logprobs_BT
    torch.testing.assert_close(player(batch, lm_mask_BT=response_mask(batch)).logprobs_BT, expected)
    capped = save_model("gemma2-logit-cap", tmp_path / "gemma")
    with pytest.raises(SetupError, match="changes its logits after the unembedding"):
        reward_player(capped, compute_of(FLOAT32), config, trained=True)


def test_trap_19_and_24_no_pair_is_split_and_microbatches_change_nothing(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    runs = {}
    for budget in (16, 4096):  # 16 is less than one answer: every pair stands alone, both sides together
        compute = FLOAT32.model_copy(update={"tokens_per_microbatch": budget})
        config = reward_config(
            tmp_path / str(budget), trained.sft, toys.pairs, max_steps=3, heldout=0.0, compute=compute, optim=CALM
        )
        reward(config)
        runs[budget] = metrics(config.run_dir), weights(config.run_dir / "final")
    for name in ("loss", "ranking_loss", "lm_loss", "accuracy", "grad_norm"):
        one_by_one, together = ([row[name] for row in runs[budget][0]] for budget in (16, 4096))
        assert one_by_one == pytest.approx(together, rel=1e-5), name
    assert distance(runs[16][1], runs[4096][1]) < 1e-5


def test_the_margin_is_per_pair_and_in_proportion_to_its_gap(trained: Trained, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{word}?", "chosen": "eee", "rejected": "abc", "score_chosen": gap, "score_rejected": 0.0}
        for word, gap in (("one", 0.5), ("two", 2.0))
    ]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    settings: dict[str, Any] = {"heldout": 0.0, "lm_weight": None, "max_steps": 1}
    losses, config = [], reward_config(tmp_path / "run", trained.sft, data, **settings)
    for name, margin in (("off", None), ("on", 3.0)):
        reward(config.model_copy(update={"run_dir": tmp_path / name, "margin": margin}))
        losses.append(metrics(tmp_path / name)[0]["ranking_loss"])
    model = reward_player(trained.sft, compute_of(config.compute), config, trained=False)
    tokens, _ = ranked_tokens(load_tokenizer(trained.sft), read_pairs(data)[0], config.max_length)
    with torch.no_grad():
        chosen_B, rejected_B, _ = score_pairs(model, tokens, None, with_lm=False)
    differences = (chosen_B - rejected_B).tolist()
    for loss, margin in zip(losses, (0.0, 3.0), strict=True):
        gaps = [row.gaps[0] or 0.0 for row in tokens]
        expected = [math.log1p(math.exp(-(d - margin * g))) for d, g in zip(differences, gaps, strict=True)]
        assert loss == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_a_margin_needs_scores_in_every_row(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="margin: found pairs without `score_chosen` and `score_rejected`"):
        reward(reward_config(tmp_path / "run", trained.sft, toys.pairs, margin=1.0))


def test_trap_24_every_score_is_read_at_the_last_counted_token(trained: Trained, tmp_path: Path) -> None:
    model = reward_player(trained.sft, compute_of(FLOAT32), reward_config(Path(), "", ""), trained=False)
    rows = token_rows(trained.sft, write_rows(tmp_path / "ranked.jsonl", ranked_rows()))[:8]
    assert len({len(response) for row in rows for response in row.responses}) > 3
    with torch.no_grad():
        chosen_B, rejected_B, _ = score_pairs(model, rows, None, with_lm=False)
        pairs = [(row.prompt, row.responses[a], row.responses[b]) for row in rows for a, b in row.pairs]
        for i, (prompt, *sides) in enumerate(pairs):
            for answer, batched in zip(sides, (chosen_B[i], rejected_B[i]), strict=True):
                assert float(batched) == pytest.approx(float(scalar_loop(model.model, prompt, answer)[0]), abs=1e-5)


def test_trap_24_identical_pairs_are_dropped_and_counted(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pair_rows()[:20]
    rows[3]["rejected"], rows[7]["rejected"] = rows[3]["chosen"], f" {rows[7]['chosen']} "
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    result = reward(reward_config(tmp_path / "run", trained.sft, data, heldout=0.0, max_steps=1))
    assert result["pairs"] == 18
    assert f"dropped 2 chosen == rejected (first {data}:4)" in capsys.readouterr().err


@pytest.mark.parametrize("own_file", [False, True])
def test_trap_31_no_prompt_is_both_learnt_and_held_out(
    own_file: bool, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pair_rows()[:40]
    # Two pairs a prompt, far apart: a split by row would tear them.
    doubled = [*rows, *({**row, "chosen": row["chosen"] + " ee"} for row in rows)]
    settings: dict[str, Any] = {"heldout": 0.3}
    if own_file:
        settings = {"heldout_data": (write_rows(tmp_path / "heldout.jsonl", rows[:10]),)}
    config = reward_config(
        tmp_path / "run", trained.sft, write_rows(tmp_path / "p.jsonl", doubled), max_steps=1, **settings
    )
    result = reward(config)
    if own_file:
        assert (result["pairs"], result["heldout_pairs"]) == (60, 10)
        assert "20 pairs share a held-out prompt" in capsys.readouterr().err
    else:
        assert result["pairs"] + result["heldout_pairs"] == 80
        assert result["pairs"] % 2 == result["heldout_pairs"] % 2 == 0


def test_held_out_pairs_that_leave_nothing_to_learn_are_refused(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    config = reward_config(tmp_path / "run", trained.sft, toys.pairs, heldout_data=(toys.pairs,))
    with pytest.raises(DataError, match="each of the 225 pairs shares its prompt with heldout_data"):
        reward(config)
    with pytest.raises(SetupError, match="max_prompts: found 2, expected at least min_prompts = 4"):
        reward(reward_config(tmp_path / "run", trained.sft, toys.pairs, max_prompts=2))
    assert not (tmp_path / "run").exists()


def test_plain_transformers_reproduces_the_scores_on_a_ragged_batch(trained: Trained, toys: Toys) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained.reward)
    model = AutoModelForSequenceClassification.from_pretrained(trained.reward)
    assert model.config.num_labels == 1
    pairs = read_pairs(toys.pairs)[0][:9]
    texts = [
        tokenizer.apply_chat_template([*pair.prompt, {"role": "assistant", "content": pair.chosen}], tokenize=False)
        for pair in pairs
    ]
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        plain = model(**batch).logits[:, 0]
        ours = reward_player(trained.sft, compute_of(FLOAT32), reward_config(Path(), "", ""), trained=False)
        ours.model.load_state_dict(model.state_dict())
        expected, _, _ = score_pairs(ours, token_rows(trained.reward, toys.pairs)[:9], None, with_lm=False)
    assert plain.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert plain.std() > 0.05


def test_the_same_run_gives_the_same_rows_and_weights_and_is_not_repeated(
    trained: Trained, toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = [reward_config(tmp_path / name, trained.sft, toys.pairs, max_steps=3) for name in "ab"]
    first, _ = reward(configs[0]), reward(configs[1])
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert same_bits(weights(tmp_path / "a" / "final"), weights(tmp_path / "b" / "final"))
    before = file_hashes(tmp_path / "a")
    assert reward(configs[0]) == first
    assert file_hashes(tmp_path / "a") == before
    assert "already finished" in capsys.readouterr().err


def test_one_clipped_step_is_adamw(trained: Trained, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows()[:60])
    optim = OptimConfig(lr=1e-2, warmup=0.0, max_grad_norm=0.1)
    config = reward_config(tmp_path / "run", trained.sft, data, optim=optim, lm_weight=None, **ONE_STEP)
    reward(config)
    model = reward_player(trained.sft, compute_of(FLOAT32), config, trained=True).model
    losses = []
    for row in token_rows(trained.sft, data):
        chosen, rejected = (scalar_loop(model, row.prompt, row.responses[i])[0] for i in row.pairs[0])
        margin = chosen - rejected
        losses.append(torch.nn.functional.softplus(-margin))
    torch.stack(losses).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.optim.AdamW(model.parameters(), lr=1e-2, betas=optim.betas, eps=optim.eps, weight_decay=0.0).step()
    expected = {name: p.detach() for name, p in model.named_parameters()}
    after = weights(config.run_dir / "final")
    # Adam's first step is about lr × sign(gradient): where a gradient is rounding alone, its sign is not defined.
    for name, tensor in expected.items():
        assert float(((after[name] - tensor).abs() < 1e-5).float().mean()) > 0.995, name

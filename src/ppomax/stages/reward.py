"""Reward model: ranking loss on preference pairs plus the paper's LM term on the preferred response (eq. 2)."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ppomax.config import RewardConfig
from ppomax.data.batches import balanced_batches
from ppomax.engine import world
from ppomax.engine.optimiser import Optimiser, learning_rate
from ppomax.models.load import (
    Compute,
    export_scalar,
    load_causal_lm,
    load_scalar_lm,
    load_tokenizer,
    tied,
)
from ppomax.models.players import Policy, Scalar
from ppomax.models.shard import shard
from ppomax.models.trunk import kept_bytes, trunk_states
from ppomax.monitor.clock import step_row
from ppomax.monitor.log import without_nan
from ppomax.rl.objectives import nll_loss
from ppomax.rl.preference import ranking_accuracy, ranking_loss
from ppomax.stages.inputs import (
    RankedTokens,
    compute_of,
    context_limit,
    fingerprint,
    memory_of,
    trained_of,
    training_of,
)
from ppomax.stages.nonfinite import NONFINITE_IN_A_ROW, failed_step, failures_after
from ppomax.stages.reward_data import reward_rows
from ppomax.stages.reward_report import heldout_summary, judged_pairs, sample_rows, write_samples
from ppomax.stages.reward_scoring import expect_comparable, passes, picked, score_pairs, score_rows, scores_by, share
from ppomax.stages.session import Session, session
from ppomax.stages.sft import adamw, of_all, rate, schedule
from ppomax.types import DataError, SetupError, Work


def reward(config: RewardConfig, *, resume: bool = False, fresh: bool = False) -> dict[str, Any]:
    """Train a reward model on preference pairs; it is in `run_dir/final`. Returns summary.json's content.

    resume, fresh, and what is raised: as for `sft`.
    """
    with session("reward", config, unit="step", resume=resume, fresh=fresh) as run:
        return run.finished() or _train(run, config)


def _train(run: Session, config: RewardConfig) -> dict[str, Any]:
    compute = compute_of(config.compute)
    if config.max_prompts < config.min_prompts:
        raise SetupError(
            f"max_prompts: found {config.max_prompts}, expected at least min_prompts = {config.min_prompts}"
        )
    tokenizer = load_tokenizer(config.model, config.compute.chat_template)
    data = reward_rows(config, tokenizer)
    expect_comparable(
        config.compare, config.model, tokenizer, compute, template=config.compute.chat_template, longest=data.longest
    )
    rows, heldout = data.learn, data.heldout
    if config.margin is not None and any(gap is None for row in rows for gap in row.gaps):
        raise DataError(
            "margin: found pairs without `score_chosen` and `score_rejected`, expected both in every row; leave it None"
        )
    first = _epoch(rows, config, 0)
    steps = config.max_steps or max(1, round(config.epochs * len(first)))
    model = shard(reward_player(config.model, compute, config, trained=True), compute, config.compute)
    context_limit(model.model, data.longest, "longest prompt + response")
    optimiser = Optimiser(model.trained_parameters(), **adamw(config.optim))
    size = optimiser.bytes()
    pairs = [sum(len(rows[i].pairs) for i in batch) for batch in first]
    again = steps > len(first)  # states that are read once are not worth keeping
    kept = kept_bytes(model, *_sequences(rows if again else ())) + kept_bytes(model, *_sequences(heldout))
    run.plan(
        f"reward: {config.model} → {run.run.final}",
        {
            "data": data.report,
            "pairs": f"{sum(pairs)} of {len(rows)} prompts to learn, {_count(heldout)} held out"
            + (f", {_count(data.test)} for the test" if data.test else "")
            + f"; {min(pairs)}–{max(pairs)} pairs a step by tokens",
            "steps": f"{steps} ({steps / len(first):.2f} epochs of {len(first)} and {sum(map(len, rows)):,} tokens)",
            "loss": f"{config.ranking_weight:g} × ranking + {config.lm_weight or 0:g} × LM on the preferred response"
            + (f", margin {config.margin:g} × score gap" if config.margin else "")
            + (f", label smoothing {config.label_smoothing:g}" if config.label_smoothing else ""),
            "schedule": schedule(config.optim, steps),
            "trained": trained_of(model),
            "compute": f"{compute.device}, {str(compute.dtype)[6:]}; checkpoints of {size / 2**30:.2f} GiB",
            "memory": f"{memory_of([model], optimiser.training_bytes(), kept)}, and activations",
        },
    )
    run.rehearse(size)
    seen = fingerprint(*map(_of_rankings, (rows, heldout, data.test)))
    restored = run.restore(frozen=[config.model], data=seen, empty=optimiser.empty_state)
    run.describe(data.card)
    start = failures = 0
    if restored is not None:
        optimiser.load_state_tensors(restored[0], adopt=world.size() > 1)
        start, failures = int(restored[1]["step"]) + 1, restored[1].get("failures", 0)
    states = _states(run, model, rows, config) if again else None
    held_states = _states(run, model, heldout, config) if heldout else None
    batches = _batches(rows, config, steps)
    with run.progress(steps, done=start) as advance:
        for step in range(start, steps):
            epoch, members = batches[step]
            began = time.perf_counter()
            row, work = _step(
                model, optimiser, [rows[i] for i in members], picked(states, members), config,
                learning_rate(step, steps, **rate(config.optim)),
            )  # fmt: skip
            row = {"step": step, "epoch": epoch, **row, **step_row(work, time.perf_counter() - began)}
            if heldout and (step % config.eval_every == 0 or step == steps - 1):
                scores = score_rows(model, heldout, held_states, config.compute.tokens_per_microbatch)
                judged = judged_pairs(heldout, scores)
                margins = torch.tensor([pair.margin for pair in judged])
                row["heldout_accuracy"] = sum(pair.right for pair in judged) / len(judged)
                row["heldout_loss"] = float(-nn.functional.logsigmoid(margins).mean())
            run.append(row)
            failures = failures_after(failures, [row["grad_norm"]])
            if failures >= NONFINITE_IN_A_ROW:
                raise failed_step(step, optimiser, [asdict(rows[i]) for i in members])
            advance(note=f"loss {row['ranking_loss']:.3f}, accuracy {row['accuracy']:.2f}")
            state = {"failures": failures}
            run.checkpoint(step, step == steps - 1, lambda state=state: (optimiser.state_tensors(), state))
    summary: dict[str, Any] = {"prompts": len(rows), "pairs": sum(len(row.pairs) for row in rows), "steps": steps}
    if data.judged:
        budget = config.compute.tokens_per_microbatch
        theirs = None
        total = share(model, data.judged, budget) * (1 if config.compare is None else 2)
        with run.progress(total, unit="prompts", what="test" if data.test else "held-out pairs") as advance:
            scores = score_rows(model, data.judged, None if data.test else held_states, budget, advance)
            if config.compare is not None:
                theirs = (config.compare, scores_by(config.compare, data.judged, compute, budget, advance))
        summary |= {"judged_on": "test" if data.test else "heldout"}
        summary |= without_nan(heldout_summary(data.judged, scores, theirs))
        rows_written = sample_rows(model, data.judged, scores, tokenizer, step=steps - 1)
        world.first(lambda: write_samples(run.run.samples, rows_written))
    return run.finish(lambda folder: export_scalar(model.model, tokenizer, folder), summary)


def reward_player(name: str, compute: Compute, config: RewardConfig, *, trained: bool) -> Scalar:
    """A scalar model on the trunk of a causal LM, with the unembedding kept where the LM term needs it."""
    unembedding = None
    if config.lm_weight is not None:
        causal = Policy(load_causal_lm(name, compute), train_layers=None, trained=False)  # refuses heads that do more
        head = causal.model.get_output_embeddings()  # type: ignore[operator]
        if head.bias is not None or not tied(causal.model):
            unembedding = copy.deepcopy(head).requires_grad_(False)  # not part of the exported model
        del causal
    model = load_scalar_lm(name, compute, fresh_head_seed=config.seed)
    return Scalar(model, trained=trained, unembedding=unembedding, **training_of(config.compute, config.seed))


def _of_rankings(rows: Sequence[RankedTokens]) -> Iterable[tuple[Sequence[int], object]]:
    """Rankings for `fingerprint`."""
    return (
        ([*row.prompt, *(i for response in row.responses for i in response)],
         ([len(response) for response in row.responses], row.pairs, row.gaps))
        for row in rows
    )  # fmt: skip


def _count(rows: Sequence[RankedTokens]) -> str:
    return f"{sum(len(row.pairs) for row in rows)} of {len(rows)}"


def _epoch(rows: Sequence[RankedTokens], config: RewardConfig, epoch: int) -> list[list[int]]:
    return balanced_batches(
        [len(row) for row in rows], tokens_per_batch=config.tokens_per_batch, min_rows=config.min_prompts,
        max_rows=config.max_prompts, seed=config.seed, epoch=epoch,
    )  # fmt: skip


def _batches(rows: Sequence[RankedTokens], config: RewardConfig, steps: int) -> list[tuple[int, list[int]]]:
    """(epoch, rows) of every step. Batches are cut by tokens, so epochs may differ by a batch or so."""
    batches: list[tuple[int, list[int]]] = []
    epoch = 0
    while len(batches) < steps:
        batches += [(epoch, members) for members in _epoch(rows, config, epoch)]
        epoch += 1
    return batches[:steps]


def _step(
    model: Scalar, optimiser: Optimiser, batch: Sequence[RankedTokens], states: Sequence[list[Tensor]] | None,
    config: RewardConfig, lr: float,
) -> tuple[dict[str, float], Work]:  # fmt: skip
    """One optimiser step, and the work that it was. Every prompt weighs the same, however many pairs it has."""
    work: list[Work] = []
    lm_tokens = sum(len(row.responses[i]) for row in batch for i in row.best)
    pairs = sum(len(row.pairs) for row in batch)
    totals = {"ranking_loss": 0.0, "lm_loss": 0.0, "accuracy": 0.0}
    for members, weight in passes(model, batch, config.compute.tokens_per_microbatch):
        rows = [batch[i] for i in members]
        chosen_B, rejected_B, lm = score_pairs(
            model, rows, picked(states, members), with_lm=config.lm_weight is not None, count=work.append
        )
        work[-1] = work[-1].needed(weight)
        weight_B = torch.tensor([1.0 / len(row.pairs) for row in rows for _ in row.pairs], device=chosen_B.device)
        gaps = [gap or 0.0 for row in rows for gap in row.gaps]
        margin_B = (config.margin or 0.0) * torch.tensor(gaps, device=chosen_B.device)
        ranking = ranking_loss(
            chosen_B, rejected_B, weight_B=weight_B, margin=margin_B, denom=len(batch),
            label_smoothing=config.label_smoothing or 0.0,
        )  # fmt: skip
        loss = config.ranking_weight * ranking
        if lm is not None and config.lm_weight is not None:
            logprobs_BT, mask_BT = lm
            lm_loss = nll_loss(logprobs_BT, mask_BT, denom=lm_tokens)
            loss = loss + config.lm_weight * lm_loss
            totals["lm_loss"] += weight * float(lm_loss.detach())
        (weight * loss).backward()
        totals["ranking_loss"] += weight * float(ranking.detach())
        totals["accuracy"] += weight * float(ranking_accuracy(chosen_B, rejected_B)) * len(chosen_B) / pairs
    totals = world.summed(totals)
    loss_value = config.ranking_weight * totals["ranking_loss"] + (config.lm_weight or 0.0) * totals["lm_loss"]
    if config.lm_weight is None:
        del totals["lm_loss"]
    row = {"loss": loss_value, **totals, "lr": lr, "grad_norm": optimiser.step(lr), "pairs": float(pairs)}
    return row, of_all(sum(work, Work()))


def _sequences(rows: Sequence[RankedTokens]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Prompt and response of every sequence that is read."""
    return [row.prompt for row in rows for _ in row.responses], [r for row in rows for r in row.responses]


def _states(
    run: Session, model: Scalar, rows: Sequence[RankedTokens], config: RewardConfig
) -> list[list[Tensor]] | None:
    """States of the frozen layers for every response of every row, where there are frozen layers."""
    flat = trunk_states(model, *_sequences(rows), budget=config.compute.tokens_per_microbatch, watch=run.reading)
    if flat is None:
        return None
    states = iter(flat)
    return [[next(states) for _ in row.responses] for row in rows]

"""Supervised fine-tuning: next-token cross-entropy on the assistant's tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ppomax.config import SFTConfig
from ppomax.data.batches import epoch_order
from ppomax.data.card import Part, data_card, heldout_learnt_too
from ppomax.data.readers import read_dialogues
from ppomax.data.split import by_weight, split_by_key
from ppomax.engine import world
from ppomax.engine.optimiser import Optimiser, learning_rate
from ppomax.models.load import export, load_causal_lm, load_tokenizer
from ppomax.models.players import Policy
from ppomax.models.shard import shard
from ppomax.models.trunk import kept_bytes, trunk_states, with_states
from ppomax.monitor.clock import step_row
from ppomax.rl.objectives import nll_loss
from ppomax.stages.inputs import (
    Tokens,
    compute_of,
    context_limit,
    dialogue_tokens,
    fingerprint,
    memory_of,
    of_dialogues,
    required,
    trained_of,
    training_of,
)
from ppomax.stages.nonfinite import NONFINITE_IN_A_ROW, failed_step, failures_after
from ppomax.stages.session import Session, session
from ppomax.types import TokenBatch, Work, to_device, token_batch


def sft(config: SFTConfig, *, resume: bool = False, fresh: bool = False) -> dict[str, Any]:
    """Fine-tune a causal LM on dialogues; the model is in `run_dir/final`. Returns summary.json's content.

    resume: go on with a run that stopped; fresh: replace what is there. Raises SetupError and DataError before the
    first step, Interrupted after a save that Ctrl-C or SIGTERM asked for, SaveError and NonFiniteError.
    """
    with session("sft", config, unit="step", resume=resume, fresh=fresh) as run:
        return run.finished() or _train(run, config)


def _train(run: Session, config: SFTConfig) -> dict[str, Any]:
    compute = compute_of(config.compute)
    specs = required(config.data, "data", "dialogues to learn from")
    tokenizer = load_tokenizer(config.model, config.compute.chat_template)
    dialogues, report = read_dialogues(specs, tokenizer)
    learn, held = split_by_key(dialogues, config.heldout, config.seed) if config.heldout else (dialogues, [])
    learnt_too = heldout_learnt_too(learn, held)
    rows, cut = dialogue_tokens(tokenizer, by_weight(learn, config.seed), config.max_length)
    aside = "dialogues that heldout sets aside"
    heldout = dialogue_tokens(tokenizer, held, config.max_length, what=aside)[0] if held else []
    per_epoch = -(-len(rows) // config.batch_size)
    steps = max(1, round(per_epoch * config.epochs))
    model = load_causal_lm(config.model, compute)
    policy = shard(Policy(model, trained=True, **training_of(config.compute, config.seed)), compute, config.compute)
    context_limit(policy.model, max(len(row.ids) for row in (*rows, *heldout)), "longest dialogue")
    optimiser = Optimiser(policy.trained_parameters(), **adamw(config.optim))
    size = optimiser.bytes()
    again = steps > per_epoch  # states that are read once are not worth keeping
    kept = kept_bytes(policy, *_split(rows)) if again else 0
    run.plan(
        f"sft: {config.model} → {run.run.final}",
        {
            "data": f"{report}; {cut}",
            "rows": f"{len(rows)} to learn ({sum(sum(r.mask) for r in rows):,} answer tokens), {len(heldout)} held out"
            + (f", of {learnt_too} of which an answer's prompt is learnt too" if learnt_too else ""),
            "steps": f"{steps} = {config.epochs:g} epochs × {per_epoch} of {config.batch_size} dialogues",
            "schedule": schedule(config.optim, steps),
            "trained": trained_of(policy),
            "compute": f"{compute.device}, {str(compute.dtype)[6:]}; checkpoints of {size / 2**30:.2f} GiB",
            "memory": f"{memory_of([policy], optimiser.training_bytes(), kept)}, and activations",
        },
    )
    run.rehearse(size)
    data = fingerprint(of_dialogues(rows), of_dialogues(heldout))
    restored = run.restore(frozen=[config.model], data=data, empty=optimiser.empty_state)
    parts = {"learn": Part(learn, _lengths(rows)), "heldout": Part(held, _lengths(heldout))}
    run.describe(data_card(report, parts, fitted=cut, learnt_too=learnt_too))
    start = failures = 0
    if restored is not None:
        optimiser.load_state_tensors(restored[0], adopt=world.size() > 1)
        start, failures = int(restored[1]["step"]) + 1, restored[1].get("failures", 0)
    budget = config.compute.tokens_per_microbatch
    states = trunk_states(policy, *_split(rows), budget=budget, watch=run.reading) if again else None
    with run.progress(steps, done=start) as advance:
        for step in range(start, steps):
            epoch, within = divmod(step, per_epoch)
            order = epoch_order(len(rows), seed=config.seed, epoch=epoch)
            members = order[within * config.batch_size : (within + 1) * config.batch_size]
            began = time.perf_counter()
            loss, work = _step(
                policy, optimiser, [rows[i] for i in members], None if states is None else [states[i] for i in members],
                budget, learning_rate(step, steps, **rate(config.optim)),
            )  # fmt: skip
            row = {"step": step, "epoch": epoch, **loss, **step_row(work, time.perf_counter() - began)}
            if heldout and (step % config.eval_every == 0 or step == steps - 1):
                row["heldout_loss"] = mean_nll(policy, heldout, budget)
            run.append(row)
            failures = failures_after(failures, [loss["grad_norm"]])
            if failures >= NONFINITE_IN_A_ROW:
                raise failed_step(step, optimiser, [asdict(rows[i]) for i in members])
            advance(note=f"loss {loss['loss']:.3f}")
            state = {"failures": failures}
            run.checkpoint(step, step == steps - 1, lambda state=state: (optimiser.state_tensors(), state))
    summary = {
        "rows": len(rows),
        "steps": steps,
        "heldout_loss": mean_nll(policy, heldout, budget) if heldout else None,
    }
    return run.finish(lambda folder: export(policy.model, tokenizer, folder), summary)


def _step(
    policy: Policy,
    optimiser: Optimiser,
    batch: Sequence[Tokens],
    states: Sequence[Tensor] | None,
    budget: int,
    lr: float,
) -> tuple[dict[str, float], Work]:
    """One optimiser step, and the work that it was."""
    denom = sum(sum(row.mask[1:]) for row in batch)
    total, work = 0.0, Work()
    for group, weight in passes(policy, batch, budget):
        tokens, mask_BT = packed([batch[i] for i in group], device=str(policy.device))
        tokens = with_states(tokens, None if states is None else [states[i] for i in group])
        work += policy.work(tokens, training=True, places=int(mask_BT.sum())).needed(weight)
        loss = weight * nll_loss(policy(tokens, mask_BT=mask_BT).logprobs_BT, mask_BT, denom=denom)
        loss.backward()
        total += float(loss.detach())
    total = world.summed({"loss": total})["loss"]
    return {"loss": total, "lr": lr, "grad_norm": optimiser.step(lr), "tokens": float(denom)}, of_all(work)


def of_all(work: Work) -> Work:
    """The work of all processes."""
    return Work(*map(int, world.summed(asdict(work)).values()))


@torch.no_grad()
def mean_nll(policy: Policy, rows: Sequence[Tokens], budget: int) -> float:
    """Mean negative log-likelihood per counted token, nats."""
    total, denom = 0.0, sum(sum(row.mask[1:]) for row in rows)
    for group, weight in passes(policy, rows, budget):
        tokens, mask_BT = packed([rows[i] for i in group], device=str(policy.device))
        total += weight * float(nll_loss(policy(tokens, mask_BT=mask_BT).logprobs_BT, mask_BT, denom=denom))
    return world.summed({"nll": total})["nll"]


def passes(policy: Policy, rows: Sequence[Tokens], budget: int) -> list[tuple[list[int], float]]:
    """Rows of similar length under a token budget: this process's passes, with their weights."""

    def cut(part: list[int]) -> list[list[int]]:
        return policy.microbatches(*_split([rows[i] for i in part]), budget=budget)

    return world.passes(_lengths(rows), cut)


def _lengths(rows: Sequence[Tokens]) -> list[int]:
    return [len(row.ids) for row in rows]


def _split(rows: Sequence[Tokens]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """First tokens and the rest: what a batch takes for prompts and responses, since a first token never counts."""
    return [row.ids[:1] for row in rows], [row.ids[1:] for row in rows]


def packed(rows: Sequence[Tokens], device: str) -> tuple[TokenBatch, torch.Tensor]:
    """Right-padded ids and their loss mask [B, T]; the first token never counts."""
    batch = token_batch(*_split(rows), device=device)
    mask_BT = torch.zeros(batch.ids_BT.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        mask_BT[i, 1 : len(row.mask)] = torch.tensor(row.mask[1:])
    return batch, to_device(mask_BT, device)


def adamw(optim: Any) -> dict[str, Any]:
    """The optimiser's arguments of a configuration."""
    return {
        "weight_decay": optim.weight_decay, "betas": optim.betas, "eps": optim.eps, "max_grad_norm": optim.max_grad_norm
    }  # fmt: skip


def rate(optim: Any) -> dict[str, Any]:
    """The schedule's arguments of a configuration."""
    return {"peak": optim.lr, "warmup": optim.warmup, "schedule": optim.schedule, "floor": optim.floor}


def schedule(optim: Any, steps: int) -> str:
    """The schedule in words, with its last value."""
    last = learning_rate(steps - 1, steps, **rate(optim))
    return f"{optim.schedule}, peak {optim.lr:g}, warm-up {round(optim.warmup * steps)} steps, last step {last:.3g}"

"""A trained reward model on other pairs: accuracy per source or subset, and whatever else is said of it."""

from __future__ import annotations

from typing import Any

from ppomax.config import RankConfig
from ppomax.data.readers import read_pairs
from ppomax.engine.durable import write_json_atomic
from ppomax.models.load import load_scalar_lm, load_tokenizer
from ppomax.models.players import Scalar
from ppomax.monitor.log import without_nan
from ppomax.monitor.progress import progress
from ppomax.monitor.report import write_report
from ppomax.stages.inputs import compute_of, context_limit, ranked_tokens, required
from ppomax.stages.reward_report import heldout_summary, sample_rows, write_samples
from ppomax.stages.reward_scoring import expect_comparable, score_rows, scores_by
from ppomax.stages.session import opened_run


def rank(config: RankConfig, *, fresh: bool = False) -> dict[str, Any]:
    """Rank the pairs of `data` by a reward model. Returns summary.json's content.

    fresh, and what is raised: as for `evaluate`.
    """
    with opened_run(
        config.run_dir, verb="rank", config=config, resume=not fresh, fresh=fresh, ignore=("run_dir",)
    ) as run:
        compute = compute_of(config.compute)
        tokenizer = load_tokenizer(config.reward, otherwise=config.compute.chat_template)
        pairs, report = read_pairs(required(config.data, "data", "preference pairs"), tokenizer)
        rows, cut = ranked_tokens(tokenizer, pairs, config.max_length)
        print(f"rank: {report}; {cut}")
        longest = max(len(row.prompt) + max(map(len, row.responses)) for row in rows)
        expect_comparable(
            config.compare, config.reward, tokenizer, compute, template=config.compute.chat_template, longest=longest
        )
        model = Scalar(load_scalar_lm(config.reward, compute), train_layers=None, trained=False)
        context_limit(model.model, longest, "longest prompt + response")
        budget = config.compute.tokens_per_microbatch
        other = None
        with progress("rank", len(rows) * (1 if config.compare is None else 2), unit="prompts") as advance:
            scores = score_rows(model, rows, None, budget, advance)
            if config.compare is not None:
                other = (config.compare, scores_by(config.compare, rows, compute, budget, advance))
        summary = without_nan({"prompts": len(rows), **heldout_summary(rows, scores, other)})
        write_samples(run.samples, sample_rows(model, rows, scores, tokenizer, step=0))
        write_json_atomic(run.summary, summary)
        write_report(run.path)
        return summary

"""Which pictures each stage gets, with one sentence on how to read it and one on what would look wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppomax.monitor.card import length_picture
from ppomax.monitor.plots import (
    Line,
    Panel,
    calibration_chart,
    heat_map,
    histogram_bars,
    line_chart,
    stacked_bars,
    trajectory,
)
from ppomax.monitor.run_files import RunFiles, series
from ppomax.monitor.time_parts import GROUPS, time_parts

_LONGER = "tokens by which the preferred answer is longer"
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Picture:
    """One drawing with its words: `read` says how to read it, `wrong` what would be a bad sign."""

    title: str
    svg: str
    read: str
    wrong: str


def pictures_of(run: RunFiles) -> list[Picture]:
    """The pictures of a run for which there are numbers."""
    makers: dict[str, Callable[[RunFiles], list[Picture]]] = {
        "sft": _sft_pictures,
        "reward": _reward_pictures,
        "ppo": _ppo_pictures,
    }
    maker = makers.get(run.stage)
    return [picture for picture in [*maker(run), _length_picture(run)] if picture.svg] if maker else []


def positions(rows: Rows, key: str) -> list[float]:
    """The x axis: the rows' own `key`, or their number where they lack it."""
    values = series(rows, key)
    return [i + 1.0 if math.isnan(value) else value for i, value in enumerate(values)]


def _length_picture(run: RunFiles) -> Picture:
    return Picture(
        "Lengths",
        length_picture(run.data, unit="a prompt" if run.stage == "ppo" else "a sequence, prompt and answer"),
        "How many tokens the rows have that are learnt from (for PPO: the prompts).",
        "A pile at the right end: many rows are cut or shortened by the length limit.",
    )


def _sft_pictures(run: RunFiles) -> list[Picture]:
    rows = run.metrics
    lines = [_line(rows, "training data", "loss"), _line(rows, "held-out data", "heldout_loss")]
    return [
        Picture(
            "Loss",
            line_chart(positions(rows, "step"), [Panel("nats per token", lines)], xlabel="optimiser step"),
            "How surprised the model is by the next token of a good answer; lower is better, and most of the fall "
            "comes early.",
            "Held-out loss that rises while training loss falls: the model learns the examples by heart. Spikes: the "
            "learning rate is too high.",
        )
    ]


def _reward_pictures(run: RunFiles) -> list[Picture]:
    rows = run.metrics
    x = positions(rows, "step")
    accuracy = [_line(rows, "training pairs", "accuracy"), _line(rows, "held-out pairs", "heldout_accuracy")]
    losses = [
        _line(rows, "total", "loss"),
        _line(rows, "ranking", "ranking_loss"),
        _line(rows, "language modelling", "lm_loss"),
        _line(rows, "held-out", "heldout_loss"),
    ]
    return [
        Picture(
            "Accuracy",
            line_chart(x, [Panel("pairs ranked rightly", accuracy, percent=True)], xlabel="optimiser step"),
            "How often the preferred answer of a pair gets the higher score. Guessing gives 50%.",
            "A gap that widens between training and held-out pairs. Note that accuracy alone does not prove a reward "
            "model good: one that has just reached its plateau can still be a bad guide for PPO.",
        ),
        Picture(
            "Margins",
            histogram_bars(
                run.summary.get("margin_histogram", {}), xlabel="score of preferred - score of other", ylabel="pairs"
            ),
            "Each held-out pair by the difference of its two scores: blue pairs are ranked rightly, red ones wrongly.",
            "A long red tail (confident mistakes) or a single narrow peak at 0 (the model cannot tell answers apart).",
        ),
        Picture(
            "Loss",
            line_chart(x, [Panel("loss", losses)], xlabel="optimiser step"),
            "The ranking loss starts near 0.69 (= ln 2, guessing) and falls as the scores learn to separate the pairs.",
            "A ranking loss that stays at 0.69, or a held-out loss that climbs.",
        ),
        *_heldout_pictures(run),
    ]


def _heldout_pictures(run: RunFiles) -> list[Picture]:
    by_length = run.summary.get("by_length") or []
    longer = [group["longer"] for group in by_length]
    right = Line("", [group["accuracy"] for group in by_length])
    chart = line_chart(longer, [Panel("pairs ranked rightly", [right], percent=True)], xlabel=_LONGER) if longer else ""
    return [
        Picture(
            "Calibration",
            calibration_chart(
                run.summary.get("calibration") or [], xlabel="how sure: sigmoid of the margin", ylabel="how often right"
            ),
            "Held-out pairs in groups by how sure the reward model is of its choice. On the dashed line it is as often "
            "right as it thinks.",
            "Points far below the line: it is sure of mistakes, and PPO will look for them. Far above: its margins are "
            "smaller than they could be, which does less harm.",
        ),
        Picture(
            "Accuracy by length",
            chart,
            "Held-out pairs in five groups by how much longer the preferred answer is. A model that judges the text "
            "does as well on the left, where the shorter answer is better, as on the right.",
            "A line that climbs steadily from below 50% on the left: it counts tokens; PPO will make answers longer.",
        ),
        *_along_pictures(run),
    ]


def _along_pictures(run: RunFiles) -> list[Picture]:
    """The score token by token, for the surest right and the most wrong pair."""
    first: dict[str, Mapping[str, Any]] = {}
    for row in run.samples:
        if row.get("along_chosen") and row.get("along_rejected"):
            first.setdefault(str(row.get("kind")), row)
    names = {"right": "surest right pair", "wrong": "most wrong pair"}
    shown = [(name, first[kind]) for kind, name in names.items() if kind in first]
    if not shown:
        return []
    longest = max(len(row[side]) for _, row in shown for side in ("along_chosen", "along_rejected"))

    def line(label: str, values: Sequence[float]) -> Line:
        return Line(label, [*values, *[math.nan] * (longest - len(values))])

    panels = [
        Panel(name, [line("preferred", row["along_chosen"]), line("other", row["along_rejected"])])
        for name, row in shown
    ]
    return [
        Picture(
            "Score along the answer",
            line_chart([float(i + 1) for i in range(longest)], panels, xlabel="token of the answer"),
            "What the score would be if the answer ended at each token. The last point of a line counts.",
            "Jumps at single words, whatever is around them, or a line that only climbs with length.",
        )
    ]


def _ppo_pictures(run: RunFiles) -> list[Picture]:
    rows = run.metrics
    x = positions(rows, "iteration")
    critic_only = [position for position, row in zip(x, rows, strict=True) if row.get("phase") == "critic"]
    shaded = (critic_only[0] - 0.5, critic_only[-1] + 0.5) if critic_only else None

    def chart(*panels: Panel) -> str:
        return line_chart(x, panels, xlabel="iteration", shaded=shaded)

    return [
        *_outcome_pictures(rows, x, chart),
        *_drift_pictures(rows, chart),
        *_training_pictures(rows, chart),
        *_time_pictures(rows, x, chart),
    ]


def _outcome_pictures(rows: Rows, x: Sequence[float], chart: Callable[..., str]) -> list[Picture]:
    score = Line("mean ± standard deviation", series(rows, "score_mean"), series(rows, "score_std"))
    gold = [("gold score", series(rows, "gold_mean")), ("score", series(rows, "score_mean"))]
    has_gold = any(math.isfinite(value) for value in series(rows, "gold_mean"))
    kl = series(rows, "kl_per_sequence")
    return [
        Picture(
            "Score of the reward model",
            chart(Panel("score", [score])),
            "What PPO tries to raise: the reward model's opinion of the sampled answers. The band shows how much the "
            "answers differ.",
            "A score that climbs without end while the samples get worse: the policy has found a hole in the reward "
            "model. A flat line: nothing is learnt.",
        ),
        Picture(
            "Distribution of the scores",
            heat_map(x, [row.get("score_histogram") for row in rows], xlabel="iteration", ylabel="score"),
            "Each column is one batch of answers; darker means more of them. The dark band should move up and keep its "
            "width.",
            "A thin line (all answers alike), two bands, or a long tail: marks of a collapse.",
        ),
        Picture(
            "Gold score against KL",
            trajectory(kl, gold, xlabel="KL to the reference, nats per response") if has_gold else "",
            "Above, the judge that PPO never sees; below, the reward model that it does. To the right, the policy is "
            "further from where it started.",
            "The lower line still rising where the upper one has turned down: from there on, PPO serves the reward "
            "model's errors.",
        ),
    ]


def _drift_pictures(rows: Rows, chart: Callable[..., str]) -> list[Picture]:
    length = [
        _line(rows, "all responses", "response_length"),
        _line(rows, "finished ones only", "response_length_finished"),
    ]
    high = [_line(rows, "on topic", "on_topic_share"), _line(rows, "distinct word pairs", "distinct_2")]
    low = [
        _line(rows, "top opening", "top_opening_share"),
        _line(rows, "top closing", "top_closing_share"),
        _line(rows, "degenerate", "degenerate_share"),
    ]
    return [
        Picture(
            "Distance from the reference (KL)",
            chart(
                Panel("nats per response", [_line(rows, "", "kl_per_sequence")]),
                Panel("nats per token", [_line(rows, "", "kl_per_token")]),
            ),
            "How far the policy has moved away from the model that it started as. It has to rise for anything to "
            "change; it should level off.",
            "An upward bend without a matching gain in the gold score.",
        ),
        Picture(
            "Response length",
            chart(
                Panel("tokens", length, from_zero=True),
                Panel("cut by the limit", [_line(rows, "", "truncated_share")], percent=True),
            ),
            "How long the answers are, and how many hit the length limit before they ended.",
            "Steady growth: reward models tend to like long answers, and PPO finds out. A fall towards a few words.",
        ),
        Picture(
            "Perplexity of the responses",
            chart(Panel("perplexity", [_line(rows, "", "perplexity")])),
            "How surprised the policy is by its own answers; a slow fall is normal, since PPO makes it surer.",
            "A sudden fall towards 1: it repeats a few phrases that it is certain of.",
        ),
        Picture(
            "Entropy",
            chart(Panel("nats per token", [_line(rows, "", "entropy")])),
            "How many different next tokens the policy still considers. Exploration needs some of it.",
            "A quick fall towards 0: no variety is left to learn from. A strong rise: the text dissolves.",
        ),
        Picture(
            "Health of the text",
            chart(Panel("should stay high", high, percent=True), Panel("should stay low", low, percent=True)),
            "Above: answers that mention something of their prompt, and variety of wording. Below: answers that share "
            "the commonest opening or closing, and broken ones.",
            "The upper lines falling or the lower ones rising: the answers are turning into a formula. The score does "
            "not show this.",
        ),
    ]


def _training_pictures(rows: Rows, chart: Callable[..., str]) -> list[Picture]:
    losses = [Panel("policy loss", [_line(rows, "", "policy_loss")]), Panel("ptx loss", [_line(rows, "", "ptx_loss")])]
    norms = [_line(rows, "policy", "grad_norm_policy"), _line(rows, "critic", "grad_norm_critic")]
    return [
        Picture(
            "Critic",
            chart(
                Panel("value loss", [_line(rows, "", "value_loss")]),
                Panel("explained variance", [_line(rows, "", "explained_variance")]),
            ),
            "The critic predicts how an answer will be scored while it is being written. Loss should fall; explained "
            "variance (1 is perfect, 0 a constant guess) should rise above 0.",
            "Explained variance that stays below 0, or a loss that grows: the policy then follows noise.",
        ),
        Picture(
            "Size of the updates",
            chart(
                Panel("tokens clipped", [_line(rows, "", "clip_fraction")], percent=True),
                Panel("approximate KL per update", [_line(rows, "", "approx_kl")]),
            ),
            "The share of tokens whose probability wanted to move further than one iteration allows, and how far the "
            "policy moved.",
            "More than a third clipped: the learning rate is too high. Exactly 0 throughout: the policy hardly moves.",
        ),
        Picture(
            "Losses and gradients",
            chart(*losses, Panel("gradient norm", norms)),
            "The policy loss hovers around 0 by construction and says little. The ptx loss measures whether ordinary "
            "language is kept.",
            "A ptx loss that rises: the model forgets. Gradient norms that jump by factors of ten.",
        ),
    ]


def _time_pictures(rows: Rows, x: Sequence[float], chart: Callable[..., str]) -> list[Picture]:
    used = [_line(rows, outer, f"utilisation/{outer}") for outer in GROUPS]
    return [
        Picture(
            "Where the time goes",
            stacked_bars(x, time_parts(rows), xlabel="iteration", ylabel="seconds"),
            "Each bar is one iteration. From the bottom: writing answers (reading the prompts, then token by token), "
            "scoring them with every model that reads them, and training on them. All parts together are the whole "
            "iteration, up to its log entry; what takes less than a hundredth of the time is in the rest of its group.",
            "A part that grows from iteration to iteration, usually because the answers grow. A large rest: time in "
            "which no model computes.",
        ),
        Picture(
            "Speed",
            chart(
                Panel("tokens per second", [_line(rows, "", "tokens_per_second")], from_zero=True),
                Panel("of the machine's peak", used, percent=True, from_zero=True),
            ),
            "Above: tokens that were written, per second of the whole iteration, scoring and training included. Below: "
            "how much of the fastest matrix products that this machine was seen to do goes into useful work, without "
            "padding. Writing answers is usually the lowest, because it computes one token of each answer at a time.",
            "A fall that is not explained by longer answers: another program took the processor, or memory is short.",
        ),
    ]


def _line(rows: Rows, label: str, key: str) -> Line:
    return Line(label, series(rows, key))

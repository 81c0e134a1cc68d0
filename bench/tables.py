"""What `make bench` writes: Markdown and a picture of the measurements, and whether the work was equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from bench.common import Run, spread, table
from bench.plan import LAYOUTS, Contender, Workload

Runs = Mapping[Contender, Sequence[Run]]


def heading(facts: Mapping[str, str]) -> str:
    """The title, and what was run where."""
    lines = [f"- {name}: {fact}" for name, fact in facts.items()]
    lines.append("- ratios: the peer's number by ppomax's in the same precision; above 1 ppomax needs less")
    return "\n".join(["# Benchmark", "", *lines])


def ppo_section(workload: Workload, runs: Runs) -> tuple[str, list[str]]:
    """The tables of a workload, and what was not equal in it."""
    best = {contender: fastest(kept) for contender, kept in runs.items()}
    full = {contender: run for contender, run in best.items() if contender.layout == "full"}
    wrong = unequal(workload, full)
    parts = [f"## PPO, {workload.name}: {workload}", _times(runs, full)]
    parts += ["Equal work, counted in the measured iterations (averages for one):", _work(full)]
    parts += [f"**Not equal:** {'; '.join(wrong)}"] if wrong else []
    less = {contender: run for contender, run in best.items() if contender.layout != "full"}
    if less:
        names = ", ".join(f"{name}: {what}" for name, what in LAYOUTS.items())
        parts += [f"ppomax with less to train, which is other work ({names}):", _layouts(best, less, runs)]
    return "\n\n".join(parts), wrong


def fastest(runs: Sequence[Run]) -> Run:
    """The repetition with the fewest seconds a generated token."""
    return min(runs, key=lambda run: sum(_measured(run, "seconds")) / sum(_measured(run, "generated")))


def unequal(workload: Workload, best: Mapping[Contender, Run]) -> list[str]:
    """What differs between the sides, or between what a side sampled and what it trained on."""
    found = []
    for contender, run in best.items():
        done, ours = _counts(run), _counts(best[contender.rival])
        if run["trained"] != run["generated"]:
            found.append(f"{contender}: generated {run['generated']} tokens, trained on {run['trained']}")
        for name, count in done.items():
            free = workload.stops and name in ("generated", "trained on")
            if not free and count != ours[name]:
                found.append(f"{name}: {contender} {count:,.12g}, {contender.rival} {ours[name]:,.12g}")
    return found


def passes_section(runs: Mapping[str, Run]) -> str:
    """Generation and log-probs beside plain transformers, by precision."""
    rows = []
    for dtype, run in runs.items():
        for name, (ours, theirs) in run["seconds"].items():
            rows.append([
                *name.split(" | "), dtype, f"{run['tokens'] / min(ours):,.0f}", f"{run['tokens'] / min(theirs):,.0f}",
                f"{min(theirs) / min(ours):.2f}×", f"{spread(ours)}, {spread(theirs)}",
            ])  # fmt: skip
    head = (
        "work", "transformers", "precision", "ppomax tokens/s", "peer tokens/s", "ratio",
        "slowest / fastest, ours and theirs",
    )  # fmt: skip
    return "\n\n".join(["## Single passes beside plain transformers, on the prompts of *fixed*", table(head, rows)])


def scaling_section(runs: Mapping[Workload, Run]) -> str:
    """Seconds of our iteration by tokens."""
    rows = []
    for workload, run in runs.items():
        seconds, tokens = mean(_measured(run, "seconds")), mean(_measured(run, "generated"))
        rows.append([
            f"{tokens:,.0f}", f"{workload.rows}", f"{workload.minibatches}", f"{seconds:.1f}",
            f"{1000 * seconds / tokens:.2f}", f"{run['peak_gib']:.2f}",
        ])  # fmt: skip
    head = ("tokens generated", "responses", "minibatches", "s / iteration", "s / 1,000 tokens", "peak GiB")
    return "\n\n".join(["## ppomax by size of the iteration", table(head, rows)])


def scaling_picture(runs: Mapping[Workload, Run], file: Path) -> str:
    """Draw the same as points, with what would be proportional to the tokens; returns the Markdown that shows it."""
    from matplotlib.figure import Figure

    points = sorted((mean(_measured(run, "generated")), mean(_measured(run, "seconds"))) for run in runs.values())
    tokens, seconds = zip(*points, strict=True)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(tokens, seconds, "o-", label="measured")
    most = max(points)
    axes.loglog(tokens, [most[1] * n / most[0] for n in tokens], "--", color="grey", label="proportional to tokens")
    axes.set(xlabel="generated tokens of an iteration", ylabel="seconds of an iteration")
    axes.legend()
    figure.savefig(file, metadata={"Date": None})
    return f"![seconds of an iteration by tokens]({file.name})"


def _measured(run: Run, name: str) -> list[float]:
    return run[name][1:]


def _counts(run: Run) -> dict[str, float]:
    """What was done in an iteration."""
    return {
        "prompt tokens": run["prompt_tokens"],
        "generated": mean(_measured(run, "generated")),
        "trained on": mean(_measured(run, "trained")),
        "minibatches": run["minibatches"],
        "numbers changed by the optimisers": mean(_measured(run, "changed")),
        "threads": run["threads"],
    }


def _speed(run: Run) -> tuple[float, float]:
    """Seconds an iteration, seconds for 1,000 generated tokens."""
    seconds = mean(_measured(run, "seconds"))
    return seconds, 1000 * seconds / mean(_measured(run, "generated"))


def _times(runs: Runs, full: Mapping[Contender, Run]) -> str:
    rows = []
    for contender, run in full.items():
        ours, (seconds, pace) = full[contender.rival], _speed(run)
        ratios = ["–", "–", "–"]
        if contender.side != "ppomax":
            our_seconds, our_pace = _speed(ours)
            ratios = [f"{seconds / our_seconds:.2f}×", f"{pace / our_pace:.2f}×"]
            ratios.append(f"{run['peak_gib'] / ours['peak_gib']:.2f}×")
        rows.append([
            str(contender), f"{seconds:.1f}", ratios[0], f"{mean(_measured(run, 'generation')):.1f}", f"{pace:.2f}",
            ratios[1], f"{run['peak_gib']:.2f}", ratios[2], _spread(runs[contender]),
        ])  # fmt: skip
    head = (
        "contender", "s / iteration", "ratio", "of it generation", "s / 1,000 tokens", "ratio", "peak GiB", "ratio",
        "slowest / fastest",
    )  # fmt: skip
    return table(head, rows)


def _spread(runs: Sequence[Run]) -> str:
    """Of the seconds a token, over all measured iterations."""
    return spread(
        seconds / tokens
        for run in runs
        for seconds, tokens in zip(_measured(run, "seconds"), _measured(run, "generated"), strict=True)
    )


def _work(full: Mapping[Contender, Run]) -> str:
    counts = {contender: _counts(run) for contender, run in full.items()}
    rows = [[str(contender), *(f"{n:,.0f}" for n in done.values())] for contender, done in counts.items()]
    return table(["contender", *next(iter(counts.values()))], rows)


def _layouts(best: Mapping[Contender, Run], less: Mapping[Contender, Run], runs: Runs) -> str:
    rows = []
    for contender, run in less.items():
        (seconds, pace), whole = _speed(run), best[contender.rival]
        rows.append([
            str(contender), f"{seconds:.1f}", f"{pace:.2f}", f"{_speed(whole)[1] / pace:.2f}×",
            f"{run['peak_gib']:.2f}", f"{mean(_measured(run, 'changed')):,.0f}", _spread(runs[contender]),
        ])  # fmt: skip
    head = (
        "layout", "s / iteration", "s / 1,000 tokens", "all layers by this", "peak GiB", "numbers changed",
        "slowest / fastest",
    )  # fmt: skip
    return table(head, rows)

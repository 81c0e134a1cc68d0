"""PPO beside TRL, generation and log-probs beside transformers: the same models, prompts, lengths, precision and steps.

    make bench                                                 # both workloads, every precision that is fast here
    make bench ARGS="--precision float32 --data hh.jsonl.gz"   # realistic prompts from a file of pairs or dialogues
    make bench ARGS=--quick                                    # the model `tiny`, a minute or two: tries the script
    make bench ARGS="--ours-only --workloads --scaling"        # our seconds by tokens alone, and a picture of them

Contenders run in turn, each in a process of its own; the fastest repetition counts, and the spread is shown (layouts
that train less than everything run once). Whether the work was equal is counted: where it was not, the file says so
and the command fails. Written section by section to bench/results.md, with --quick to build/bench-quick.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from bench import tables
from bench.common import Run, in_turn, processor, versions
from bench.plan import LONG_SCALE, OUR_PRECISION, PRECISIONS, SCALES, Contender, Workload, contenders, workloads


def main() -> None:
    """The contender that is named, or all of them and the file."""
    arguments = _arguments()
    known = workloads(
        arguments.rows, arguments.new_tokens, (*SCALES, LONG_SCALE)[: 4 if arguments.long else 3 * arguments.scaling]
    )
    if arguments.contender:
        print(json.dumps(_contend(arguments, known)))
        return
    with tempfile.TemporaryDirectory() as work:
        wrong = _bench(arguments, known, work)
    print(arguments.out.read_text(encoding="utf-8"))
    if wrong:
        sys.exit("the work was not equal: " + "; ".join(wrong))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help="default: those that are fast here")
    parser.add_argument("--workloads", nargs="*", choices=["fixed", "realistic"], default=["fixed", "realistic"])
    parser.add_argument("--data", help="prompts of the realistic workload; default: the quickstart's, which are short")
    parser.add_argument("--rows", type=int, default=32, help="responses an iteration, a multiple of 8")
    parser.add_argument("--new-tokens", type=int, default=64, help="of fixed; realistic stops at twice as many at most")
    parser.add_argument("--iterations", type=int, default=2, help="of a run, the first of which warms up")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each contender")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where both sides compute")
    parser.add_argument("--ours-only", action="store_true", help="without TRL")
    parser.add_argument("--scaling", action="store_true", help="also our iteration at 1k, 4k and 16k tokens")
    parser.add_argument("--long", action="store_true", help="the same, and 64k")
    parser.add_argument("--quick", action="store_true", help="tiny model, few tokens, float32, one run each")
    parser.add_argument("--out", type=Path, help="default: bench/results.md, with --quick build/bench-quick.md")
    for internal in ("--contender", "--workload", "--work"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.iterations < 2:
        parser.error(f"--iterations: found {arguments.iterations}, expected 2 or more, because the first one warms up")
    if arguments.rows < 8 or arguments.rows % 8:
        parser.error(f"--rows: found {arguments.rows}, expected a multiple of 8")
    if not arguments.ours_only and not find_spec("trl"):
        parser.error("TRL is not installed; `make bench` installs it, or give --ours-only")
    if arguments.quick:
        quick = {"model": "tiny", "rows": 8, "new_tokens": 16, "repeats": 1}
        vars(arguments).update(quick, precision=arguments.precision or ["float32"])
    results = "bench/results.md" if arguments.device == "cpu" else f"bench/results-{arguments.device}.md"
    arguments.out = arguments.out or Path("build/bench-quick.md" if arguments.quick else results)
    return arguments


def _contend(arguments: argparse.Namespace, known: dict[str, Workload]) -> Run:
    """What this process was started for."""
    from bench.materials import prepare
    from bench.passes import measure
    from bench.ppo import contend

    kind, *details = arguments.contender.split()
    work = Path(arguments.work)
    if kind == "prepare":
        return prepare(arguments.model, arguments.data, list(known.values()), work)
    if kind == "passes":
        return measure(
            arguments.model, details[0], known["fixed"], work, repeats=arguments.repeats, device=arguments.device
        )
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        return contend(Contender(kind, *details), arguments, known[arguments.workload], work, Path(scratch))


def _bench(arguments: argparse.Namespace, known: dict[str, Workload], work: str) -> list[str]:
    """Run everything and write the file, section by section; returns what was not equal."""

    def turns(names: list[str], repeats: int = 1, workload: str = "") -> dict[str, list[Run]]:
        given = [*sys.argv[1:], "--work", work, "--workload", workload]
        return in_turn("bench.run", {name: [*given, "--contender", name] for name in names}, repeats)

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    machine = turns(["prepare"])["prepare"][0]
    precisions = arguments.precision or PRECISIONS[: 3 if machine["bfloat16"] else 1]
    dtypes = list(dict.fromkeys(OUR_PRECISION[p] for p in precisions))
    sections, wrong = [tables.heading(_facts(arguments, machine))], []

    def write(section: str) -> None:
        sections.append(section)
        arguments.out.write_text("\n\n".join(sections) + "\n", encoding="utf-8")

    for name in arguments.workloads:
        chosen = contenders(precisions, trl=not arguments.ours_only, layouts=name == "fixed")
        runs = turns([str(one) for one in chosen if one.layout == "full"], arguments.repeats, name)
        runs |= turns([str(one) for one in chosen if one.layout != "full"], 1, name)
        section, unequal = tables.ppo_section(known[name], {one: runs[str(one)] for one in chosen})
        write(section)
        wrong += unequal
    if arguments.workloads:
        names = {dtype: f"passes {dtype}" for dtype in dtypes}
        write(tables.passes_section({dtype: turns([name])[name][0] for dtype, name in names.items()}))
    scales = [workload for name, workload in known.items() if name not in ("fixed", "realistic")]
    if scales:
        ours = str(Contender("ppomax", dtypes[0]))
        runs = {one: turns([ours], 1, one.name)[ours][0] for one in scales}
        picture = tables.scaling_picture(runs, arguments.out.with_name(f"{arguments.out.stem}-scaling.svg"))
        write(tables.scaling_section(runs) + f"\n\n{picture}")
    return wrong


def _facts(arguments: argparse.Namespace, machine: Run) -> dict[str, str]:
    given = list(sys.argv[1:])
    if arguments.data:  # a path says something about a machine, not about the data
        given = [word.replace(arguments.data, Path(arguments.data).name) for word in given]
    packages = ["ppomax", "torch", "transformers", "accelerate", *([] if arguments.ours_only else ["trl"])]
    return {
        "command": "`make bench" + (f" ARGS={shlex.quote(shlex.join(given))}" if given else "") + f"`, {date.today()}",
        "machine": f"{processor()}; cores: {machine['cores']}; {machine['memory']} of memory; "
        f"{machine['matrix products']}; load {machine['load']:.1f} before the start",
        "versions": f"python {machine['python']}, {versions(*packages)}",
        "PPO": f"{arguments.model}, four of them; everything in policy and critic is trained, one epoch; fastest of "
        f"{arguments.repeats} runs of {arguments.iterations} iterations, the first of each left out",
    }


if __name__ == "__main__":
    main()

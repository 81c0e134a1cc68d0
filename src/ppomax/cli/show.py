"""What the command line prints: the verbs, recipes, a run's summary, the doctor's findings, errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppomax.cli.parse import ABOUT, VERBS
from ppomax.config import Schema
from ppomax.config.layers import nearest, plain
from ppomax.config.recipes import RECIPES
from ppomax.errors import SetupError, printable
from ppomax.monitor.progress import LastingConsole

GIB = 2**30


def show_error(message: str) -> None:
    """'error: …' on stderr."""
    _stderr().print(Text.assemble(("error: ", "bold red"), printable(message)), soft_wrap=True)


def show_stopped(message: str) -> None:
    """Why the run ended early, on stderr."""
    _stderr().print(Text(message, style="yellow"), soft_wrap=True)


def show_verbs() -> None:
    """`ppomax --help`."""
    console = _stdout()
    console.print(
        "usage: ppomax VERB [OPTIONS]\n\nRLHF with PPO, whole: fine-tuning, reward model, PPO-max, evaluation.\n"
    )
    table = _columns()
    for name, about in ABOUT.items():
        table.add_row(Text(f"  {name}", style="bold"), Text(about.splitlines()[0]))
    console.print(table)
    console.print("\nppomax VERB --help shows a verb's options with their defaults; ppomax --version the version.")


def show_recipe_chosen(name: str, recipe: str) -> None:
    """What the chosen recipe does, before the run, on stderr."""
    _stderr().print(Text(f"recipe {recipe}: {_described(VERBS[name].recipes[recipe])}"), soft_wrap=True)


def show_recipes() -> None:
    """Every recipe with its docstring, by verb."""
    table = _columns()
    for verb, recipe, function in _recipes():
        table.add_row(Text(verb, style="dim"), Text(recipe, style="bold"), Text(_described(function)))
    _stdout().print(table)


def show_recipe(name: str) -> None:
    """A recipe as YAML that `--config` takes; one that several verbs have is named `verb/recipe`."""
    found = _named(name)
    if len(found) > 1:
        raise SetupError(
            f"recipe '{name}': found several, expected one of {', '.join(f'{v}/{name}' for v, _ in found)}"
        )
    for verb, config in found:
        print(f"# ppomax {verb} --recipe {name.rpartition('/')[2]}")
        print(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True), end="")


def show_difference(a: str, b: str) -> None:
    """The settings in which two recipes of one verb differ."""
    others = dict(_named(b))
    pairs = [(config, others[verb]) for verb, config in _named(a) if verb in others]
    if not pairs:
        raise SetupError(f"recipes '{a}' and '{b}' are for different verbs; expected two of one verb")
    table = _columns("setting", a, b)
    for one, other in pairs:
        left, right = dict(_flat(plain(one))), dict(_flat(plain(other)))
        for key in dict.fromkeys([*left, *right]):  # a number in one may be a number by source in the other
            values = [_as_yaml(side[key]) if key in side else "" for side in (left, right)]
            if values[0] != values[1]:
                table.add_row(Text(key), *map(Text, values))
    _stdout().print(table if table.row_count else f"{a} and {b} are equal")


def show_summary(run_dir: Path, summary: Mapping[str, Any] | None) -> None:
    """The result of a run in a short table, and where to look."""
    table = _columns("", "")
    table.show_header, table.columns[0].no_wrap = False, True  # a name is looked up, so it stays whole
    for key, value in _flat(summary or {}):
        sentences = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not isinstance(value, list) or sentences or len(value) <= 3:  # a histogram belongs into the report
            table.add_row(Text(key), Text("\n".join(value) if sentences else _number(value)))
    console = _stdout()
    console.print(table)
    for path in (run_dir / "final", run_dir / "report.html"):
        if path.exists():
            console.print(Text(str(path), style="bold"), soft_wrap=True)


def show_doctor(found: Mapping[str, Any]) -> None:
    """The doctor's findings, what will be slow last."""
    console, packages, machine = _stdout(), _columns(), _columns()
    for package in found["packages"]:
        if package["version"] is not None:
            packages.add_row(Text(package["name"]), Text(package["version"]))
        else:
            missing = f"missing: needed for {package['purpose']}; {package['install']}"
            packages.add_row(Text(package["name"]), Text(missing, style="yellow"))
    for name, fact in found["machine"].items():
        machine.add_row(Text(name), Text(fact))
    console.print(Text("installed", style="bold"), packages, Text("\nthis machine", style="bold"), machine, sep="\n")
    console.print(
        Text("\nwhat will be slow or fail, and why" if found["concerns"] else "\nnothing here is slow", "bold")
    )
    for concern in found["concerns"]:
        console.print(Text(f"- {concern}"), soft_wrap=True)


def show_checkpoints(found: Path | Sequence[Mapping[str, Any]]) -> None:
    """A table of checkpoints, newest last, and below it what is damaged; or the path of an exported model."""
    if isinstance(found, Path):
        print(found)
        return
    table = _columns("checkpoint", "size", "age", "state")
    for row in found:
        state = Text("damaged", style="yellow") if row["problems"] else Text("intact")
        table.add_row(Text(row["name"]), Text(row["size"]), Text(row["age"]), state)
    _stdout().print(table)
    for problem in (problem for row in found for problem in row["problems"]):
        _stdout().print(Text(problem, style="yellow"), soft_wrap=True)


def show_replay(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Losses, norms and the first number that is none, in a column for each precision."""
    table = _columns("", *found)
    table.columns[0].no_wrap = True
    for key in dict.fromkeys(key for column in found.values() for key in column):
        table.add_row(Text(key), *(Text(_number(column.get(key))) for column in found.values()))
    _stdout().print(table)


def show_plan(found: Mapping[str, Any]) -> None:
    """The planner's findings: what was counted for, every layout, the shown one's bytes and seconds, what to turn."""
    console, machine = _stdout(), found["machine"]
    models, layouts = _columns(), _columns("layout", "GiB", "fits", "worst phase", "PFLOP an iteration")
    for shape in dict.fromkeys(model["shape"] for model in found["models"].values()):
        names = [name for name, model in found["models"].items() if model["shape"] == shape]
        models.add_row(Text(", ".join(names)), Text(shape))
    for layout in found["layouts"]:
        worst = max(layout["phases"], key=layout["phases"].get)
        fits = Text("yes", style="green") if layout["fits"] else Text("no", style="red")
        layouts.add_row(Text(layout["name"]), _gib(layout["peak"]), fits, worst, f"{layout['flops'] / 1e15:,.3g}")
    about = (
        f"{machine['devices']} × {machine['memory'] / GIB:,.1f} GiB, of which {machine['usable'] / GIB:,.1f} count; "
        f"{machine['dtype']}; microbatches of {found['microbatch']['rows']:.3g} responses, "
        f"{found['microbatch']['tokens']:,.0f} tokens"
    )
    console.print(Text("models", style="bold"), models, Text("\nmachine", style="bold"), Text(about), sep="\n")
    console.print(Text("\nlayouts: the peak of one device", style="bold"), layouts, sep="\n")
    what = "recommended, the first that fits" if found["recommended"] else "nothing fits; what needs least"
    console.print(Text(f"\n{what}: {found['shown']}", style="bold"))
    console.print(Text(found["flags"] or "the settings as they are"), soft_wrap=True)
    _show_bytes(console, found)
    _show_time(console, found)
    if found["knobs"]:
        console.print(Text("\nwhat to turn, each by itself", style="bold"))
    for knob in found["knobs"]:
        fits = "fits" if knob["fits"] else "does not fit"
        console.print(Text(f"- {knob['change']}: {_gib(knob['peak'])} GiB, {fits}"), soft_wrap=True)


def _show_bytes(console: Console, found: Mapping[str, Any]) -> None:
    parts = ("weights", "gathered", "masters", "moments", "gradients", "activations")
    players = _columns("GiB of one device", "parameters", *parts)
    for name, player in found["players"].items():
        numbers = [f"{found['models'][name]['parameters'] / 1e9:.3g} B", *(_gib(player[part]) for part in parts)]
        players.add_row(Text(name), *numbers)
    table = _columns("phase", "GiB", "made of")
    for name, phase in found["phases"].items():
        made = ", ".join(f"{part} {_gib(size)}" for part, size in phase.items())
        table.add_row(Text(name), _gib(sum(phase.values())), Text(made))
    console.print("", players, "", table, sep="\n")
    if found["host"]:
        held = ", ".join(f"{part} {_gib(size)} GiB" for part, size in found["host"].items())
        console.print(Text(f"in the host's memory, for all devices: {held}"), soft_wrap=True)


def _show_time(console: Console, found: Mapping[str, Any]) -> None:
    table = _columns("an iteration", "PFLOP", "seconds")
    for phase, operations in found["flops"].items():
        seconds = "" if found["seconds"] is None else f"{found['seconds'][phase]:,.1f}"
        table.add_row(phase, f"{operations / 1e15:,.4g}", seconds)
    if found["seconds"] is not None:
        table.add_row("all", f"{sum(found['flops'].values()) / 1e15:,.4g}", f"{sum(found['seconds'].values()):,.1f}")
    speed, machine = [], found["machine"]
    speed += [] if machine["tflops"] is None else [f"{machine['tflops']:.4g} TFLOP/s"]
    speed += [] if machine["bandwidth"] is None else [f"{machine['bandwidth']:,.4g} GB/s"]
    console.print("", table, sep="\n")
    at = f"at {' and '.join(speed)} of one device" if speed else "--tflops and --bandwidth turn these into seconds"
    console.print(Text(at))


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB / 10 or not size else f"{size / GIB:.2g}"


def _recipes() -> Iterator[tuple[str, str, Any]]:
    for verb, recipes in RECIPES.items():
        for name, function in recipes.items():
            yield verb, name, function


def _named(name: str) -> list[tuple[str, Schema]]:
    """(verb, configuration) of every recipe of that name, or of the one that `verb/recipe` names."""
    found = [(verb, function()) for verb, recipe, function in _recipes() if name in (recipe, f"{verb}/{recipe}")]
    if not found:
        close = nearest(name, [recipe for _, recipe, _ in _recipes()])
        known = ", ".join(f"{verb}/{recipe}" for verb, recipe, _ in _recipes())
        raise SetupError(f"unknown recipe '{name}'{close} Known: {known}")
    return found


def _described(function: Any) -> str:
    return " ".join((function.__doc__ or "").split())


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("...\n").strip()


def _number(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_number, value))
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(*headers: str) -> Table:
    table = Table(box=None, show_header=bool(headers), pad_edge=False, padding=(0, 2, 0, 0))
    for header in headers:
        table.add_column(Text(header))
    return table


class _PipedConsole(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # `main` knows what it means; rich would end with a failure


def _stdout() -> Console:
    return _PipedConsole(highlight=False)


def _stderr() -> Console:
    return LastingConsole(stderr=True, highlight=False)

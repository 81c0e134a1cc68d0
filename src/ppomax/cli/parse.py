"""From the words after `ppomax` to a configuration: recipe, then YAML file, then flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from ppomax.config import (
    ChatConfig,
    CheckpointConfig,
    DoctorConfig,
    EvaluateConfig,
    PlanConfig,
    PPOConfig,
    QuickstartConfig,
    RankConfig,
    ReplayConfig,
    ReportConfig,
    RewardConfig,
    Schema,
    SFTConfig,
)
from ppomax.config.layers import nearest, overlay, read_yaml
from ppomax.config.recipes import PPO_RECIPES, REWARD_RECIPES, SFT_RECIPES, recipe_named
from ppomax.errors import SetupError

Recipes = Mapping[str, Callable[[], Schema]]


@dataclass(frozen=True)
class Verb:
    """A verb's schema, its recipes if it has any, and the run flags that it takes besides its settings.

    words: settings that may be given in this order without their flags, before all flags.
    """

    schema: type[Schema]
    recipes: Recipes = dataclasses.field(default_factory=dict)
    flags: tuple[str, ...] = ("config",)
    words: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        """The schema's docstring."""
        return self.schema.__doc__ or ""


@dataclass(frozen=True)
class RecipesArguments:
    """List the named recipes, print one as YAML, or compare two."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(help="Print this recipe in full, as YAML.")] = None
    diff: Annotated[
        tuple[str, str] | None, tyro.conf.arg(metavar="A B", help="Print the settings that differ between two recipes.")
    ] = None


VERBS = {
    "sft": Verb(SFTConfig, SFT_RECIPES, ("config", "recipe", "resume", "fresh")),
    "reward": Verb(RewardConfig, REWARD_RECIPES, ("config", "recipe", "resume", "fresh")),
    "ppo": Verb(PPOConfig, PPO_RECIPES, ("config", "recipe", "resume", "fresh")),
    "plan": Verb(PlanConfig, PPO_RECIPES, ("config", "recipe", "json")),
    "evaluate": Verb(EvaluateConfig, flags=("config", "fresh")),
    "rank": Verb(RankConfig, flags=("config", "fresh")),
    "chat": Verb(ChatConfig),
    "report": Verb(ReportConfig, flags=(), words=("run_dir",)),
    "checkpoint": Verb(CheckpointConfig, flags=(), words=("action", "run_dir")),
    "replay": Verb(ReplayConfig, flags=(), words=("run_dir",)),
    "quickstart": Verb(QuickstartConfig),
    "doctor": Verb(DoctorConfig, flags=()),
}
ABOUT = {
    **{name: verb.about for name, verb in VERBS.items() if name != "doctor"},
    "recipes": RecipesArguments.__doc__ or "",
    "doctor": VERBS["doctor"].about,
}


@dataclass(frozen=True)
class Invocation:
    """A parsed command line: the verb's settings, the recipe they began with, and the flags that are not settings."""

    config: Any
    recipe: str | None
    options: dict[str, bool]


def expect_verb(name: str) -> None:
    """Refuse an unknown verb, naming the nearest."""
    if name not in ABOUT:
        raise SetupError(f"unknown verb '{name}'{nearest(name, list(ABOUT))} Known: {', '.join(ABOUT)}")


def parse(name: str, words: Sequence[str]) -> Invocation:
    """The invocation of verb `name`; words that are not understood, and --help, end in SystemExit."""
    verb = VERBS[name]
    words = _with_flags(verb, _with_negative_names(words))
    _refuse_repeated(verb, words)
    recipe, base = _below_flags(verb, words)
    defaults: dict[str, Any] = {"config": None, "recipe": recipe, "resume": False, "fresh": False, "json": False}
    form = _form(verb)
    given = tyro.cli(
        form,
        prog=f"ppomax {name}",
        description=_description(name, verb),
        args=list(words),
        default=form(settings=base, **{flag: defaults[flag] for flag in verb.flags}),
        registry=_as_dicts(),
    )
    options = {flag: getattr(given, flag) for flag in ("resume", "fresh", "json") if flag in verb.flags}
    return Invocation(overlay(base, given.settings, origin="command line"), recipe, options)


def parse_recipes(words: Sequence[str]) -> RecipesArguments:
    """The arguments of `ppomax recipes`."""
    return tyro.cli(RecipesArguments, prog="ppomax recipes", args=list(words))


def _with_flags(verb: Verb, words: Sequence[str]) -> list[str]:
    """Leading words that are no flags get the flags that they stand for."""
    given = list(words)
    for at, setting in enumerate(verb.words):
        if len(given) <= 2 * at or given[2 * at].startswith("-"):
            break
        given.insert(2 * at, f"--{setting.replace('_', '-')}")
    return given


def _with_negative_names(words: Sequence[str]) -> list[str]:
    """`--save.keep-best -loss` as one word: what begins with a dash would be taken for a flag."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in ("--save.keep-best", "--save.keep_best") and word[:1] == "-" != word[1:2]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _refuse_repeated(verb: Verb, words: Sequence[str]) -> None:
    """A list that is given twice: only the last would count."""
    seen: set[str] = set()
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if flag in seen and (flag == "--config" or _takes_several(verb.schema, flag.removeprefix("--").split("."))):
            raise SetupError(
                f"{flag}: found it twice, of which only the last would count; expected it once"
                + ("" if flag == "--config" else f", with all values after it: {flag} A B")
            )
        if word.startswith("--"):
            seen.add(flag)


def _takes_several(schema: type[Schema], path: Sequence[str]) -> bool:
    field = schema.model_fields.get(path[0].replace("-", "_"))
    if field is None:
        return False
    kind = field.annotation
    if len(path) > 1:
        return isinstance(kind, type) and issubclass(kind, Schema) and _takes_several(kind, path[1:])
    return tuple in (get_origin(kind), *map(get_origin, get_args(kind)))


def _below_flags(verb: Verb, words: Sequence[str]) -> tuple[str | None, Schema]:
    """The recipe's name and the settings that the flags are laid over."""
    file = _value_of("--config", words) if "config" in verb.flags else None
    values = read_yaml(Path(file)) if file else {}
    recipe: str | None = None
    if verb.recipes:
        in_file = values.pop("recipe", None)
        recipe = _value_of("--recipe", words) or (None if in_file is None else str(in_file))
    base = verb.schema(**recipe_named(recipe, verb.recipes).model_dump()) if recipe else verb.schema()
    return recipe, overlay(base, values, origin=file) if file else base


def _value_of(flag: str, words: Sequence[str]) -> str | None:
    """The last value of a flag among unparsed words."""
    found = None
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        if word == flag and not following.startswith("--"):
            found = following
        elif word.startswith(f"{flag}="):
            found = word.removeprefix(f"{flag}=")
    return found


def _form(verb: Verb) -> Any:
    """A dataclass of the run flags and the settings, for tyro to fill."""
    kinds = {
        "config": Annotated[Path | None, tyro.conf.arg(metavar="FILE", help="YAML file laid over the recipe.")],
        "recipe": Annotated[
            Literal[(*verb.recipes, None)],  # type: ignore[valid-type]
            tyro.conf.arg(metavar="NAME", help=f"Settings to start from: {', '.join(verb.recipes)}."),
        ],
        "resume": Annotated[
            bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Go on with the run from its newest checkpoint.")
        ],
        "fresh": Annotated[
            bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Delete the run that is there and start over.")
        ],
        "json": Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Print everything counted, as JSON.")],
    }
    settings = ("settings", Annotated[verb.schema, tyro.conf.arg(name="")])
    return dataclasses.make_dataclass("Form", [*((flag, kinds[flag]) for flag in verb.flags), settings], frozen=True)


def _as_dicts() -> ConstructorRegistry:
    """Let tyro return settings as nested dicts: `overlay` then checks flags exactly as it checks a file."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def schema_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not (isinstance(info.type, type) and issubclass(info.type, Schema)):
            return None
        fields = tuple(
            StructFieldSpec(name, known.annotation, getattr(info.default, name), known.description)  # type: ignore[arg-type]
            for name, known in info.type.model_fields.items()
        )
        return StructConstructorSpec(dict, fields)

    return registry


def _description(name: str, verb: Verb) -> str:
    parts = [verb.about]
    if verb.recipes:
        parts.append("A flag overrides the file, which overrides the recipe. `ppomax recipes` describes the recipes.")
    elif "config" in verb.flags:
        parts.append("A flag overrides the file.")
    if verb.words:
        words = " ".join(word.upper() for word in verb.words)
        parts.append(f"The flags may be left out of the first settings: ppomax {name} {words}.")
    return " ".join(parts)

"""What README and docs tell people to type is what the program takes: commands, files of settings, Python."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import ppomax
from ppomax.cli.parse import VERBS, parse, parse_recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What stands for something of the reader's.
MEANT = {"SIZE": "7b", "GPUS": "8x80g", "RUN_DIR": "runs/ppo", "DIR": "runs/ppo", "N": "2"}
BEGINS = re.compile(r"(?:torchrun .*-m )?ppomax (?P<words>.*)")
FILE = re.compile(r"# (?P<name>[\w.-]+\.yaml):")


def blocks(page: Path, language: str = "") -> list[list[str]]:
    """The page's indented and fenced code (`language`: of fenced blocks), block by block."""
    found: list[list[str]] = [[]]
    fence = None
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fence = line.strip().removeprefix("```") if fence is None else None
            found.append([])
        elif fence is not None:
            if fence == language:
                found[-1].append(line)
        elif line.startswith("    ") and not language:
            found[-1].append(line[4:])
        elif line.strip():
            found.append([])
    return [block for block in found if block]


def commands() -> list[tuple[str, str]]:
    """Page and words of every `ppomax` command, its continuation lines joined."""
    found = []
    for page in PAGES:
        for block in blocks(page):
            text = "\n".join(block).replace("\\\n", " ")
            for line in text.splitlines():
                if match := BEGINS.match(line.strip()):
                    found.append((page.name, re.split(r" [&|>] ", match["words"])[0]))
    return found


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda x: x[:60])
def test_a_command_of_the_docs_is_taken(page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [MEANT.get(word, word) for word in shlex.split(line, comments=True)]
    for file in re.findall(r"\S+\.yaml", line):
        Path(file).write_text("seed: 0\n", encoding="utf-8")
    verb, *rest = words
    if verb == "recipes":
        parse_recipes(rest)
    elif verb != "VERB":
        assert verb in VERBS, page
        if "--help" not in rest:
            parse(verb, rest)


def test_the_docs_have_commands_of_every_verb() -> None:
    assert {line.split()[0] for _, line in commands()} >= {*VERBS} - {"replay", "doctor"}


def test_a_file_of_settings_in_the_docs_is_taken(tmp_path: Path) -> None:
    found = 0
    for page in PAGES:
        for block in blocks(page):
            if block and (match := FILE.match(block[0])):
                verb = re.search(r"ppomax (\w+)", block[0])
                assert verb is not None, block[0]
                file = tmp_path / match["name"]
                file.write_text("\n".join(block), encoding="utf-8")
                config = parse(verb[1], ["--config", str(file)]).config
                for key, value in yaml.safe_load(file.read_text(encoding="utf-8")).items():
                    assert key == "recipe" or _says(getattr(config, key), value), (page.name, key)
                found += 1
    assert found


def _says(setting: Any, written: Any) -> bool:
    if isinstance(written, dict):
        return all(_says(getattr(setting, key), value) for key, value in written.items())
    if isinstance(written, list):
        return list(setting) == written
    return setting == (Path(written) if isinstance(setting, Path) else written)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_docs_has_settings_that_are_taken(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse("\n".join(block))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ppomax":
                assert node.attr in ppomax.__all__, node.attr
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("ppomax.recipe", "ppomax.PPOConfig"):
                eval(compile(ast.Expression(node), page.name, "eval"), {"ppomax": ppomax})

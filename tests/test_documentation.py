import ast
import importlib
import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest

import sb3_mtrl
from sb3_mtrl.common import prioritized
from sb3_mtrl.common.evaluation import evaluate_multi_task_policy

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page: Path) -> list[str]:
    """
    :param page: A Markdown file
    :return: Its Python examples
    """
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """
    :param page: A Markdown file
    :return: What links to its headings end with, by the rule of GitHub
    """
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def id_of(page: Path) -> str:
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=id_of)
def test_examples_import_what_there_is(page):
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_ones_own_environment_is_learned():
    (block,) = python_blocks(ROOT / "docs" / "environments.md")
    names: dict[str, Any] = {}
    exec(block, names)
    result = evaluate_multi_task_policy(names["model"], names["env"], n_eval_episodes_per_task=5)
    assert result.task_names == ("left", "right")
    assert result.success_rates.tolist() == [1.0, 1.0]


def argument_tables() -> list[tuple[str, dict[str, list[str]]]]:
    """
    :return: For each table of arguments in algorithms.md the heading above it, and the cells of each row by its first
    """
    tables: list[tuple[str, dict[str, list[str]]]] = []
    heading = ""
    for block in (ROOT / "docs" / "algorithms.md").read_text().split("\n\n"):
        heading = next((line[3:] for line in block.splitlines() if line.startswith("## ")), heading)
        rows = [[cell.strip() for cell in re.split(r" ?\| ?", line)[1:-1]] for line in block.splitlines() if line[:1] == "|"]
        if rows and rows[0][:2] in (["argument", "default"], ["`replay_buffer_kwargs`", "default"]):
            tables.append((heading, {row[0]: row[1:] for row in rows[2:]}))
    return tables


def told_defaults(names: str, cell: str) -> dict[str, dict[str, Any]]:
    """
    :param names: First cell of a row, e.g. "`a`, `b`"
    :param cell: Its second, e.g. "`None`; PaCoSAC: e^-10, 1"
    :return: What each argument is by default, by the names of the classes that are named, "" for the others
    """
    arguments = re.findall(r"`(\w+)`", names)
    told = {}
    for part in cell.split("; "):
        owners, _, values = part.rpartition(": ")
        texts = [value.strip("`").replace("e^-10", repr(math.exp(-10))) for value in values.split(", ")]
        defaults = [ast.literal_eval(text) for text in texts]
        told |= {
            owner: dict(zip(arguments, defaults * (len(arguments) // len(defaults)), strict=True))
            for owner in owners.split(", ")
        }
    return told


def test_tables_of_arguments_tell_the_defaults():
    everyone = ["MTSAC", "PaCoSAC", "CMTASAC", "TSACSAC", "STARSSAC"]
    owners = {
        "MTSAC": everyone,
        **{name: [name] for name in everyone[1:]},
        "Prioritized replay": ["TaskPrioritizedReplayBuffer"],
    }
    headings = []
    for heading, rows in argument_tables():
        headings.append(heading)
        for names, (cell, *_) in rows.items():
            if not cell:
                continue
            told = told_defaults(names, cell)
            for owner in owners[heading]:
                signature = inspect.signature(getattr(sb3_mtrl, owner, None) or getattr(prioritized, owner)).parameters
                for name, default in told.get(owner, told[""]).items():
                    if (owner, name) != ("TSACSAC", "optimizer_order"):
                        assert signature[name].default == default, (owner, name)
    assert headings == ["MTSAC", "PaCoSAC", "CMTASAC", "TSACSAC", "Prioritized replay"]

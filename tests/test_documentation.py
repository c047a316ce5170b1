import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

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

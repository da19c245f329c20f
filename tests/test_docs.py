"""The pages say what is so: links lead somewhere, commands run."""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from cli.test_commands import COMMANDS
from command_line import kairos_apart

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def names(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())

    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]

    assert missing == []


def test_the_map_names_every_page_and_every_folder() -> None:
    text = (ROOT / "docs" / "README.md").read_text()
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
    folders = [
        "adapters",
        "scheduler_core",
        "predictors",
        "policies",
        "migrations",
        "tests",
        "examples",
        "benchmarks",
        "deploy",
    ]

    assert [page for page in pages if f"({page})" not in text] == []
    assert [folder for folder in folders if f"`{folder}/" not in text] == []


def test_every_command_is_in_the_pages() -> None:
    text = "\n".join(page.read_text() for page in PAGES)

    for command in COMMANDS:
        parts = [rf"(?:[a-z]+ \| )*{re.escape(part)}" for part in command]
        assert re.search(rf"kairos {' '.join(parts)}\b", text), f"no page names 'kairos {' '.join(command)}'"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "quickstart.md"], ids=["README", "quickstart"])
def test_the_commands_of_a_page_run_in_their_order(page: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    commands = [line for block in blocks(page, "bash") for line in block.splitlines() if line]

    assert commands
    for command in commands:
        program, *arguments = shlex.split(command, comments=True)
        assert program == "kairos"
        kairos_apart(*arguments, cwd=tmp_path)


def test_the_results_page_says_what_the_results_files_say() -> None:
    tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))

    assert (ROOT / "docs" / "results.md").read_text() == tables["page"]()
    assert (ROOT / "docs" / "statistics.md").read_text() == tables["statistics_page"]()
    assert (ROOT / "docs" / "deployment.md").read_text() == tables["deployment_page"]()
    assert (ROOT / "docs" / "engines.md").read_text() == tables["engines_page"]()
    assert (ROOT / "docs" / "gateway.md").read_text() == tables["gateway_page"]()

"""The pages say what is so: links lead somewhere, commands run, the README shows what the demo prints."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli.test_commands import COMMANDS

from kairos.adapters.traces import write_trace
from kairos.adapters.traces.generate import generate
from kairos.adapters.traces.synthetic_telemetry import write_telemetry

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def names(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def kairos(*arguments: str, cwd: Path) -> str:
    """What the command prints on stdout, in a process of its own."""
    program = [sys.executable, "-c", "from kairos.adapters.cli import main; main()", *arguments]
    ended = subprocess.run(program, cwd=cwd, capture_output=True, text=True)
    assert ended.returncode == 0, f"kairos {shlex.join(arguments)}: {ended.stderr}"
    return ended.stdout


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())

    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]

    assert missing == []


def test_the_map_names_every_page_and_every_folder() -> None:
    text = (ROOT / "docs" / "README.md").read_text()
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
    folders = ["adapters", "scheduler_core", "predictors", "policies", "migrations", "tests", "examples", "benchmarks"]

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
        kairos(*arguments, cwd=tmp_path)


def skeleton(text: str) -> list[str]:
    """What is left of the demo's output without numbers, names of files, and words that hang on the numbers."""
    lines = []
    for line in text.splitlines():
        line = re.sub(r"^(- \w+) .*", r"\1", line)  # a verdict
        line = re.sub(r"predicted TTFT .*", "predicted TTFT", line)
        line = re.sub(r"^(\d\. \w+ \w+ [^/]*?)\S*/\S*.*", r"\1", line)  # a step and its file
        line = re.sub(r"^\S+( \(SYNTHETIC\))?, target", "TRACE, target", line)
        line = re.sub(r" \([^)]*\)", "", line)
        line = " ".join(re.sub(r"[\d.,]+", "#", line).split())
        if line and "mixed" not in line:
            lines.append(line)
    return lines


def test_the_readme_shows_what_the_demo_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "traces").mkdir(parents=True)
    write_trace(generate("mooncake_conversation", 90, seed=1), tmp_path / "data" / "traces" / "some.csv.gz")
    write_telemetry(tmp_path / "data" / "telemetry", seed=1)
    monkeypatch.setenv("KAIROS_DATA", str(tmp_path / "data"))

    printed = kairos("demo", "--out", "demo-out", cwd=tmp_path)

    command, _, shown = blocks(ROOT / "README.md", "text")[0].partition("\n")
    assert command == "$ make demo"
    assert skeleton(shown) == skeleton(printed)
    assert (tmp_path / "demo-out" / "report.html").exists()

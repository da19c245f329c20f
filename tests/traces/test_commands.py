"""`kairos trace ...` from the outside: what goes to stdout, what to stderr, what is raised."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kairos.adapters.cli import traces
from kairos.scheduler_core.errors import InputError

app = typer.Typer()
traces.register(app)
run = CliRunner().invoke

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,0
"""


def test_a_generated_trace_can_be_described(tmp_path: Path) -> None:
    path = str(tmp_path / "code.csv.gz")
    made = run(app, ["trace", "generate", "--like", "azure2023_conv", "--duration", "30", "--seed", "1", "-o", path])
    told = run(app, ["trace", "describe", path, "--json"])

    assert made.exit_code == told.exit_code == 0
    assert "SYNTHETIC requests, synthetic_azure2023_conv," in made.stdout
    figures = json.loads(told.stdout)
    assert (figures["name"], figures["synthetic"], figures["block_hit_share"]) == ("code", True, None)
    assert f"{path}: {figures['requests']:,} SYNTHETIC" in made.stdout


def test_a_converted_trace_goes_to_its_file_and_notes_to_stderr(tmp_path: Path) -> None:
    source, output = tmp_path / "azure.csv", tmp_path / "ours.csv"
    source.write_text(AZURE)

    result = run(app, ["trace", "convert", str(source), "-o", str(output), "--json"])

    assert json.loads(result.stdout)["requests"] == 2
    assert result.stderr == "note: 1 rows: GeneratedTokens 0, counted as 1 token\n"
    assert output.read_text() == "arrival_s,input_tokens,output_tokens\n0.0,374,44\n4.314579,396,1\n"


def test_a_description_in_words_names_what_it_counts(tmp_path: Path) -> None:
    source = tmp_path / "azure.csv"
    source.write_text(AZURE)

    result = run(app, ["trace", "describe", str(source)])

    assert result.stdout.startswith("azure: 2 requests in 4.3 s\n")
    assert "input tokens             p50 385" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["describe", "missing.csv"],
        ["convert", "missing.csv", "-o", "x.csv"],
        ["generate", "--like", "nobody", "-o", "x.csv"],
        ["generate", "--duration", "-1", "-o", "x.csv"],
        ["generate", "--duration", "5", "-o", "no/such/folder/x.csv"],
    ],
)
def test_bad_input_is_raised_as_an_input_error(arguments: list[str]) -> None:
    assert isinstance(run(app, ["trace", *arguments]).exception, InputError)


@pytest.mark.parametrize("command", ["generate", "convert", "describe"])
def test_every_command_shows_an_example(command: str) -> None:
    assert f"Example: kairos trace {command}" in run(app, ["trace", command, "--help"]).stdout

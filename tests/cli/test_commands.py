"""Every command: an example in its help, JSON alone on stdout, a start that people do not notice."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import kairos

from kairos.adapters.cli import commands

TRACE = "arrival_s,input_tokens,output_tokens\n" + "".join(f"{n / 4},{500 * (n % 7 + 1)},20\n" for n in range(400))


def names_of(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    inside = getattr(command, "commands", None)
    if inside is None:
        yield path
        return
    for name, sub in inside.items():
        yield from names_of(sub, (*path, name))


COMMANDS = list(names_of(typer.main.get_command(commands())))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_help_of_every_command_has_an_example_of_it(command: tuple[str, ...]) -> None:
    ended = kairos(*command, "--help")

    assert ended.code == 0
    assert f"Example: kairos {' '.join(command)}" in ended.stdout


def test_the_commands_that_are_promised_are_there() -> None:
    assert {" ".join(command) for command in COMMANDS} >= {
        *("demo", "simulate", "compare", "bound", "train", "evaluate", "predict", "serve", "policies"),
        *("strategies list", "experiments verify"),
        *("report", "trace generate", "trace convert", "trace describe", "config check", "config schema"),
    }


def test_json_is_all_that_goes_to_stdout(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE.replace("0.25,1000,20", "0.25,1000,0"))
    compared = ("compare", trace, "--fleet", "b300", "--strategies", "engine-default,kairos", "--seeds", 1, "--jobs", 1)

    for arguments in (
        ("simulate", trace, "--fleet", "b300", "--out", tmp_path / "run"),
        (*compared, "--out", tmp_path / "cmp"),
        ("bound", trace, "--fleet", "b300"),
        ("report", tmp_path / "cmp" / "results.json", "--out", tmp_path / "report.html"),
        ("trace", "describe", trace),
        ("policies",),
        ("strategies",),
    ):
        ended = kairos(*arguments, "--json")

        assert ended.code == 0, ended
        assert json.loads(ended.stdout), arguments


def test_the_table_of_a_comparison_has_the_bound_and_a_verdict_per_pair(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(TRACE)
    names = "engine-default,tuned,kairos"

    ended = kairos(
        "compare", tmp_path / "trace.csv", "--fleet", "b300", "--strategies", names, "--loads", "0.8", "--seeds", 1,
        "--jobs", 1, "--target", "fixed:2/tpot:0.05", "--out", tmp_path / "out",
    )  # fmt: skip

    lines = ended.stdout.splitlines()
    assert lines[0] == "trace, target fixed:2/tpot:0.05, load 0.8"
    assert [line.split("  ")[0] for line in lines[2:6]] == [*names.split(","), "no scheduler exceeds"]
    assert sum(line.startswith("- ") for line in lines) == 3
    assert ended.stdout.endswith(
        f"results in {tmp_path / 'out' / 'results.json'}, report in {tmp_path / 'out' / 'report.html'}\n"
    )


def test_the_program_starts_quickly_and_loads_nothing_heavy() -> None:
    heavy = ("scipy", "lightgbm", "sklearn", "pyarrow", "fastapi", "pydantic", "jinja2", "joblib")
    program = (
        "import sys; from kairos.adapters.cli import main\n"
        "sys.argv = ['kairos', '--help']\n"
        "try: main()\n"
        f"except SystemExit: print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    began = time.perf_counter()

    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert ended.stderr.strip() == "[]"
    assert "kairos [OPTIONS] COMMAND" in ended.stdout
    assert time.perf_counter() - began < 4.0  # 0.25 s on a quiet machine


def test_a_missing_extra_is_named_in_one_line() -> None:
    program = (
        "import sys; sys.modules['uvicorn'] = None; from kairos.adapters.cli import main\n"
        "sys.argv = ['kairos', 'serve', '--config', 'kairos.yaml']; main()"
    )

    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "kairos: this needs the package uvicorn: pip install 'kairos-scheduler[all]'\n"

"""The `kairos` program: the one place that wires all parts together. One module a group of commands."""

import sys
from typing import TYPE_CHECKING, cast

from kairos.scheduler_core.errors import InputError, KairosError

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Run the program. Bad input ends with exit code 2 and one line; what fails inside Kairos with 1."""
    try:
        code = _run()
    except InputError as problem:
        code = _say(problem, 2)
    except KairosError as problem:
        code = _say(problem, 1)
    except OSError as problem:
        if problem.filename is None:
            raise
        code = _say(f"{problem.filename}: {problem.strerror}; check the path and who may write there", 2)
    except ModuleNotFoundError as problem:
        if problem.name is None or problem.name.startswith("kairos"):
            raise
        extra = "torch" if problem.name in ("torch", "safetensors") else "all"
        code = _say(f"this needs the package {problem.name}: pip install 'kairos-scheduler[{extra}]'", 1)
    raise SystemExit(code)


def _run() -> int:
    import typer
    from typer.main import get_command

    wrong_command_line = cast(type[typer.BadParameter], typer.BadParameter.__base__)
    try:
        return get_command(commands())(standalone_mode=False) or 0
    except wrong_command_line as problem:
        told = problem.format_message()
        if not told:  # nothing was asked for, and the help is printed
            return 2
        return _say(f"{told.rstrip('.')}; see {problem.ctx.command_path if problem.ctx else 'kairos'} --help", 2)
    except typer.Abort:
        return 130


def commands() -> "typer.Typer":
    """All commands."""
    import typer

    from kairos.adapters.cli import (
        configuration,
        db,
        demo,
        doctor,
        experiments,
        explain,
        gateway,
        keys,
        load,
        models,
        policies,
        profile,
        rehearse,
        report,
        serve,
        simulate,
        strategies,
        telemetry,
        traces,
        worker,
    )

    app = typer.Typer(
        name="kairos",
        help="SLO-aware scheduling for LLM inference split into prefill and decode instances.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    offline = (demo, simulate, load, models, profile, telemetry, traces, policies, report)
    online = (serve, gateway, worker, explain, doctor, db, keys, strategies, experiments, rehearse)
    for group in (*offline, *online, configuration):
        group.register(app)
    return app


def _say(problem: Exception | str, code: int) -> int:
    """One line on stderr; returns the exit code."""
    print(f"kairos: {' '.join(str(problem).split())}", file=sys.stderr)
    return code

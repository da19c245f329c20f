"""The `kairos` program: the one place that wires all parts together. One module a group of commands."""

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

from kairos.scheduler_core.errors import InputError, KairosError

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Run the program. Bad input ends with exit code 2 and one line; what fails inside Kairos with 1."""
    if find_spec("typer") is None:
        _say("commands need the extra 'simulate': pip install 'kairos-scheduler[simulate]'")
        raise SystemExit(1)
    import typer
    from typer.main import get_command

    wrong_command_line = cast(type[typer.BadParameter], typer.BadParameter.__base__)
    try:
        raise SystemExit(get_command(commands())(standalone_mode=False))
    except wrong_command_line as problem:
        told = problem.format_message()
        if told:  # without, help was asked for by giving no arguments, and is printed
            _say(f"{told.rstrip('.')}; see {problem.ctx.command_path if problem.ctx else 'kairos'} --help")
        raise SystemExit(2) from None
    except typer.Abort:
        raise SystemExit(130) from None
    except InputError as problem:
        _say(problem)
        raise SystemExit(2) from None
    except KairosError as problem:
        _say(problem)
        raise SystemExit(1) from None
    except OSError as problem:
        if problem.filename is None:
            raise
        _say(f"{problem.filename}: {problem.strerror}; check the path and who may write there")
        raise SystemExit(2) from None


def commands() -> "typer.Typer":
    """All commands."""
    import typer

    from kairos.adapters.cli import (
        configuration,
        db,
        demo,
        models,
        policies,
        report,
        serve,
        simulate,
        telemetry,
        traces,
    )

    app = typer.Typer(
        name="kairos",
        help="SLO-aware scheduling for LLM inference split into prefill and decode instances.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for group in (demo, simulate, models, telemetry, traces, policies, report, serve, db, configuration):
        group.register(app)
    return app


def _say(problem: Exception | str) -> None:
    print(f"kairos: {' '.join(str(problem).split())}", file=sys.stderr)

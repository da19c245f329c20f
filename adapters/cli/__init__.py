"""The `kairos` program: the one place that wires all parts together. One module a group of commands."""

import sys

from kairos.scheduler_core.errors import InputError, KairosError


def main() -> None:
    """Run the program. Bad input ends with exit code 2 and one line; what fails inside Kairos with 1."""
    try:
        import typer
    except ImportError:
        print("kairos: commands need the extra 'simulate': pip install 'kairos-scheduler[simulate]'", file=sys.stderr)
        raise SystemExit(1) from None
    from kairos.adapters.cli import configuration, demo, models, policies, report, serve, simulate, traces

    app = typer.Typer(
        name="kairos",
        help="SLO-aware scheduling for LLM inference split into prefill and decode instances.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for group in (demo, simulate, models, traces, policies, report, serve, configuration):
        group.register(app)
    try:
        app()
    except InputError as problem:
        _say(problem)
        raise SystemExit(2) from None
    except KairosError as problem:
        _say(problem)
        raise SystemExit(1) from None


def _say(problem: Exception) -> None:
    print(f"kairos: {' '.join(str(problem).split())}", file=sys.stderr)

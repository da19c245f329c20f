"""What commands share in speaking to people: progress on stderr, the one way to write a share, what a run attained."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

if TYPE_CHECKING:
    from kairos.adapters.simulator.evidence import Summary

T = TypeVar("T")


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, to be told how much is done; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def tracked(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a bar on stderr while they are taken."""
    with progress(what, total) as advance:
        for done, item in enumerate(items, start=1):
            yield item
            advance(done)


def percent(share: float | None, digits: int = 1) -> str:
    """A share from 0 to 1 in percent.

    >>> percent(0.9574)
    '95.7 %'
    """
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def tell_summary(summary: "Summary", headline: str, out: Path, as_json: bool) -> None:
    """Print what a run attained, or its summary.json."""
    if as_json:
        import msgspec

        typer.echo(msgspec.json.encode(summary).decode())
        return
    m = summary.metrics
    typer.echo(headline)
    for name, value in (("TTFT", m.ttft_attainment), ("TPOT", m.tpot_attainment), ("both", m.slo_attainment)):
        typer.echo(f"  {name:5} met {percent(value)}")
    typer.echo(f"  files in {out}")

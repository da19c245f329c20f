"""What commands share in speaking to people: progress on stderr, the one way to write a share."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, to be told how much is done; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def percent(share: float | None, digits: int = 1) -> str:
    """A share from 0 to 1 in percent.

    >>> percent(0.9574)
    '95.7 %'
    """
    return "-" if share is None else f"{100 * share:.{digits}f} %"

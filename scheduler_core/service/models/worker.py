"""The training process: `python -m kairos.scheduler_core.service.models.worker`, started by the service.

What it needs comes on stdin, so that no password is in the list of processes.
"""

import ctypes
import os
import signal
import sys
import time
from typing import Annotated, Any

import msgspec

from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.errors import StoreError
from kairos.scheduler_core.service.models.lifecycle import Lifecycle, LostLeaseError
from kairos.scheduler_core.service.store.session import Store

IDLE_S = 60.0
"""It ends after so long without work; the service starts another one when there is some."""
_POLL_S = 0.5
_NICE = 10
_PR_SET_PDEATHSIG = 1
"""Source: prctl(2)."""


class Order(msgspec.Struct):
    """What the service tells it."""

    url: str
    settings: dict[str, Any]
    holder: str
    """Of the lease."""
    parent: Annotated[int, msgspec.Meta(gt=0)]
    """Process id of the service; without it there is nobody to work for."""


def main() -> None:
    """Work until there is nothing to do, the service is gone, or another process has the lease."""
    _end_with_the_service()
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    os.nice(_NICE)
    store = Store(order.url)
    try:
        _work(Lifecycle(store, Settings.model_validate(order.settings), order.holder), order.parent)
    except LostLeaseError:
        return
    except StoreError as error:
        sys.exit(f"the training process ends: {error}")
    finally:
        store.close()


def _end_with_the_service() -> None:
    """Have the kernel end this process when the service ends, however it does; elsewhere `_work` notices."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _work(lifecycle: Lifecycle, parent: int) -> None:
    idle_since_s = time.monotonic()
    while os.getppid() == parent and time.monotonic() - idle_since_s < IDLE_S:
        if lifecycle.go_on():
            idle_since_s = time.monotonic()
        else:
            time.sleep(_POLL_S)


if __name__ == "__main__":
    main()

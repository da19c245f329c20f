"""Kairos inside vLLM: `vllm serve ... --scheduler-cls kairos.adapters.vllm.Scheduler` (docs/engines.md).

`Scheduler` is made when it is asked for, since it derives from a class of vLLM: everything else here can be imported
where vLLM is not installed.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "Scheduler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from kairos.adapters.vllm.scheduler import KairosScheduling

    found = type("Scheduler", (KairosScheduling, AsyncScheduler), {"__doc__": __doc__, "__module__": __name__})
    globals()[name] = found
    return found

"""Kairos inside SGLang, through its plugin hooks: `SGLANG_PLUGINS=kairos` (docs/engines.md).

The targets are internal functions of SGLang 0.5.23. Each hook falls back to what SGLang would do.
"""

import logging
import os

POLICY = "sglang.srt.managers.schedule_policy.SchedulePolicy"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
CHOSEN_BY = "SGLANG_PLUGINS"

_log = logging.getLogger(__name__)


def register() -> None:
    """Register the hooks; SGLang calls it in each of its processes.

    Only where SGLANG_PLUGINS names kairos: that Kairos is installed for something else shall change no engine.
    """
    if "kairos" not in [name.strip() for name in os.environ.get(CHOSEN_BY, "").split(",")]:
        _log.info("kairos is installed and not used: %s does not name it", CHOSEN_BY)
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from kairos.adapters.sglang import hooks

    HookRegistry.register(f"{SCHEDULER}.init_schedule_policy", hooks.after_init_schedule_policy, HookType.AFTER)
    HookRegistry.register(f"{SCHEDULER}.process_batch_result", hooks.after_process_batch_result, HookType.AFTER)
    HookRegistry.register(f"{SCHEDULER}._get_new_prebuilt_batch", hooks.around_prebuilt_batch, HookType.AROUND)
    HookRegistry.register(f"{POLICY}.calc_priority", hooks.after_calc_priority, HookType.AFTER)
    HookRegistry.register(f"{POLICY}.shortest_prefill_chunk_limit", hooks.around_chunk_limit, HookType.AROUND)

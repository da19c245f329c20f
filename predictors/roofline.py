"""Step times with no data at all: what the GPU's bandwidth and FLOPs and the model's size say.

Good for ratios between profiles, which is what `closest` needs; alone it is within about a factor of two.
"""

import math
import re
from collections.abc import Iterable

import msgspec

from kairos.scheduler_core.domain import Line, LinearStepTimes, Profile

_GPUS = {
    "b300": (2500e12, 8.0e12),
    "b200": (2250e12, 8.0e12),
    "gh200": (989e12, 4.0e12),
    "h200": (989e12, 4.8e12),
    "h100": (989e12, 3.35e12),
    "h20": (148e12, 4.0e12),
    "a100": (312e12, 2.0e12),
    "mi300": (1307e12, 5.3e12),
    "l40s": (362e12, 0.86e12),
    "a10": (125e12, 0.6e12),
    "l4": (121e12, 0.3e12),
}
"""Dense bf16 FLOPs and bytes per second, by the beginning of the name. Source: vendors' data sheets."""
_OTHER_GPU = (989e12, 3.35e12)
_SIZES = {"bloom": (176e9, 176e9), "gpt-oss-120b": (117e9, 5.1e9), "gpt-oss-20b": (21e9, 3.6e9)}
_SIZES |= {"deepseek-r1": (671e9, 37e9), "deepseek-v3": (671e9, 37e9)}
"""All and active parameters of models whose name does not tell them."""
_OTHER_SIZE = (30e9, 30e9)

_COMPUTE_SHARE, _ATTENTION_SHARE, _BANDWIDTH_SHARE = 0.55, 0.3, 0.7
"""What a serving engine reaches of the peak."""
_STEP_OVERHEAD_S = 3e-3


class Hardware(msgspec.Struct, frozen=True):
    """What a profile has to work with, and on."""

    flops: float
    bytes_per_s: float
    parameters: float
    active_parameters: float
    bytes_per_parameter: float


def hardware_of(profile: Profile) -> Hardware:
    """Read off the names of GPU, model and precision; a middling guess for what they do not tell.

    >>> hardware_of(Profile("H100-80GB-SXM", "Qwen/Qwen3-30B-A3B", "fp8")).active_parameters
    3000000000.0
    """
    gpu = profile.gpu.lower()
    flops, bytes_per_s = next((numbers for name, numbers in _GPUS.items() if name in gpu), _OTHER_GPU)
    model = profile.model.lower()
    named = next((sizes for name, sizes in _SIZES.items() if name in model), None)
    if named is None:
        total = re.search(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)b(?![a-z0-9])", model)
        active = re.search(r"(?<![a-z0-9.])a(\d+(?:\.\d+)?)b(?![a-z0-9])", model)
        size = float(total[1]) * 1e9 if total else _OTHER_SIZE[0]
        named = size, float(active[1]) * 1e9 if active else size
    precision = profile.precision.lower()
    width = 0.5 if "4" in precision else 1.0 if "8" in precision else 2.0
    faster = 2.0 if width < 2 and not gpu.startswith("a100") else 1.0
    return Hardware(flops * faster, bytes_per_s, *named, width)


def roofline(profile: Profile) -> LinearStepTimes:
    """Linear step times from first principles.

    A step reads the weights once and the KV of its contexts, and computes 2 FLOPs per active parameter and token.
    """
    h = hardware_of(profile)
    flops = h.flops * profile.tp
    bandwidth = h.bytes_per_s * profile.tp * _BANDWIDTH_SHARE
    # tensor parallelism syncs twice a layer: a share of what it saves
    overhead_s = _STEP_OVERHEAD_S * (1 + 0.15 * math.log2(profile.tp))
    token_s = 2 * h.active_parameters / (flops * _COMPUTE_SHARE)
    # layers x hidden size grows with the 2/3 power of the size, KV bytes per token (grouped heads) with its 0.4th
    layers_x_hidden = 655_360 * (h.parameters / 70e9) ** (2 / 3)
    kv_bytes = 131_072 * (h.parameters / 8e9) ** 0.4
    weights_s = h.active_parameters * h.bytes_per_parameter / bandwidth
    return LinearStepTimes(
        prefill=Line(overhead_s + weights_s, token_s, 4 * layers_x_hidden / (flops * _ATTENTION_SHARE)),
        decode=Line(overhead_s + weights_s, token_s, kv_bytes / bandwidth),
    )


def reference_s(profile: Profile) -> tuple[float, float]:
    """Roofline seconds of a prefill step of 2,048 tokens and of a decode step of 8 requests at 2,048 tokens each."""
    times = roofline(profile)
    return times.remaining_prefill_s(2048, 0, None), times.decode_step_s(8, 8 * 2048)


def closest(profile: Profile, among: Iterable[Profile]) -> Profile:
    """The profile most like this one: by name of model, GPU and engine, then by roofline times."""

    def distance(other: Profile) -> tuple[float, str]:
        ours, theirs = reference_s(profile), reference_s(other)
        apart = sum(abs(math.log2(a / b)) for a, b in zip(ours, theirs, strict=True))
        apart += 2.0 * (profile.model != other.model) + 1.0 * (profile.gpu != other.gpu)
        apart += 0.5 * (profile.precision != other.precision) + 0.5 * abs(math.log2(profile.ep / other.ep))
        apart += 1.0 * (profile.engine.partition("-")[0] != other.engine.partition("-")[0])
        return apart, other.profile_id

    return min(among, key=distance)

"""What a snapshot may not say, beyond what the types of its fields exclude: each problem with the path of its field."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from kairos.scheduler_core.errors import FieldsError, TooLargeError, UnknownNameError
from kairos.scheduler_core.service.schemas import (
    ResidentRequest,
    RunningRequest,
    Snapshot,
    TransferredRequest,
    WaitingRequest,
)

FieldError = tuple[str, str]

_SHOWN = 100
"""How many problems of one snapshot are told."""
_MOST_CHUNKS = 2_000_000
"""Chunks of all prompts together; each takes a prediction."""


def check_snapshot(snapshot: Snapshot, slo_classes: Mapping[str, object], max_requests: int) -> None:
    """Pass a snapshot that makes sense.

    Raises:
        TooLargeError: it holds more requests than `max_requests`.
        FieldsError: what is wrong, and where.
    """
    count = len(snapshot.waiting) + len(snapshot.running) + len(snapshot.transferred) + len(snapshot.resident)
    if count > max_requests:
        raise TooLargeError(f"the snapshot holds {count} requests, the limit is {max_requests}; send fewer")
    problems = list(islice(_problems(snapshot, slo_classes), _SHOWN))
    if problems:
        raise FieldsError(problems)


def _problems(snapshot: Snapshot, slo_classes: Mapping[str, object]) -> Iterator[FieldError]:
    roles: dict[str, str] = {}
    for index, instance in enumerate(snapshot.instances):
        if instance.instance_id in roles:
            yield f"instances[{index}].instance_id", f"'{instance.instance_id}' is there twice"
        roles[instance.instance_id] = instance.role
    yield from _ids(snapshot)
    yield from _chunks(snapshot)
    classes = dict.fromkeys(slo_classes, True)
    for index, waiting in enumerate(snapshot.waiting):
        if waiting.cached_tokens_by_instance or waiting.instance_id or waiting.decode_instance_id:
            yield from _references(f"waiting[{index}]", waiting, roles)
        cached = max([waiting.cached_tokens, *waiting.cached_tokens_by_instance.values()])
        if cached + waiting.prefilled_tokens >= waiting.prompt_tokens:
            yield _too_many(f"waiting[{index}]", waiting)
        if waiting.prefilled_tokens and waiting.instance_id is None:
            yield f"waiting[{index}].instance_id", "is needed when prefilled_tokens is above 0: its KV is somewhere"
        if waiting.slo_class not in classes:
            yield f"waiting[{index}].slo_class", _unknown_class(waiting.slo_class, classes)
    for index, running in enumerate(snapshot.running):
        path = f"running[{index}]"
        yield from _instance(f"{path}.instance_id", running.instance_id, "prefill", roles)
        if running.decode_instance_id is not None:
            yield from _instance(f"{path}.decode_instance_id", running.decode_instance_id, "decode", roles)
        if running.cached_tokens + running.prefilled_tokens >= running.prompt_tokens:
            yield _too_many(path, running)
        if running.slo_class not in classes:
            yield f"{path}.slo_class", _unknown_class(running.slo_class, classes)
    for index, transferred in enumerate(snapshot.transferred):
        path = f"transferred[{index}]"
        if transferred.instance_id is not None:
            yield from _instance(f"{path}.instance_id", transferred.instance_id, "decode", roles)
        yield from _decoding(path, transferred, classes)
    for index, resident in enumerate(snapshot.resident):
        path = f"resident[{index}]"
        yield from _instance(f"{path}.instance_id", resident.instance_id, "decode", roles)
        yield from _decoding(path, resident, classes)
    for index, step in enumerate(snapshot.ended_steps):
        role = roles.get(step.instance_id)
        if role is None:
            yield from _instance(f"ended_steps[{index}].instance_id", step.instance_id, "", roles)
        elif role == "decode" and not step.batch_size:
            yield f"ended_steps[{index}].batch_size", "is needed for a step of a decode instance"
        elif role == "prefill" and not step.new_tokens:
            yield f"ended_steps[{index}].new_tokens", "is needed for a step of a prefill instance"


def _ids(snapshot: Snapshot) -> Iterator[FieldError]:
    lists: tuple[tuple[str, Iterable[WaitingRequest | RunningRequest | TransferredRequest | ResidentRequest]], ...] = (
        ("waiting", snapshot.waiting),
        ("running", snapshot.running),
        ("transferred", snapshot.transferred),
        ("resident", snapshot.resident),
    )
    seen: set[int | str] = set()
    kind: type | None = None
    for name, requests in lists:
        for index, request in enumerate(requests):
            request_id = request.request_id
            if request_id in seen:
                yield f"{name}[{index}].request_id", f"{request_id!r} is there twice"
            seen.add(request_id)
            if kind is not type(request_id):
                if kind is not None:
                    yield f"{name}[{index}].request_id", "is text where others are numbers, or the other way; use one"
                kind = type(request_id)


def _chunks(snapshot: Snapshot) -> Iterator[FieldError]:
    tokens = sum(r.prompt_tokens for r in snapshot.waiting) + sum(r.prompt_tokens for r in snapshot.running)
    for index, instance in enumerate(snapshot.instances):
        if instance.chunk_tokens is not None and tokens > _MOST_CHUNKS * instance.chunk_tokens:
            yield f"instances[{index}].chunk_tokens", f"cuts {tokens} prompt tokens into over {_MOST_CHUNKS} chunks"


def _references(path: str, waiting: WaitingRequest, roles: Mapping[str, str]) -> Iterator[FieldError]:
    for name in waiting.cached_tokens_by_instance:
        yield from _instance(f"{path}.cached_tokens_by_instance.{name}", name, "prefill", roles)
    if waiting.instance_id is not None:
        yield from _instance(f"{path}.instance_id", waiting.instance_id, "prefill", roles)
    if waiting.decode_instance_id is not None:
        yield from _instance(f"{path}.decode_instance_id", waiting.decode_instance_id, "decode", roles)


def _instance(path: str, name: str, role: str, roles: Mapping[str, str]) -> Iterator[FieldError]:
    if name not in roles:
        yield path, f"there is no instance '{name}' in the snapshot"
    elif roles[name] != role:
        yield path, f"'{name}' is a {roles[name]} instance; a {role} instance belongs here"


def _too_many(path: str, request: WaitingRequest | RunningRequest) -> FieldError:
    return (
        f"{path}.prompt_tokens",
        f"cached and prefilled tokens leave none of {request.prompt_tokens} to compute; leave one at least",
    )


def _decoding(
    path: str, request: TransferredRequest | ResidentRequest, classes: Mapping[str, object]
) -> Iterator[FieldError]:
    if request.output_tokens and request.first_token_s is None:
        yield f"{path}.first_token_s", "is needed when a token was emitted (output_tokens above 0)"
    if not request.output_tokens and request.arrival_s is None:
        yield f"{path}.arrival_s", "is needed when no token was emitted (output_tokens 0)"
    if request.slo_class not in classes:
        yield f"{path}.slo_class", _unknown_class(request.slo_class, classes)


def _unknown_class(name: str, classes: Iterable[str]) -> str:
    return str(UnknownNameError("SLO class", name, classes))

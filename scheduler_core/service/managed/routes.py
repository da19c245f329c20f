"""`/requests`, the managed form, and `/instances`, the live fleet."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, HTTPException, Path, Request
from starlette.routing import BaseRoute

from kairos.scheduler_core.service.access import tenant_of
from kairos.scheduler_core.service.managed.fleet import Member
from kairos.scheduler_core.service.managed.reservation import Reservation
from kairos.scheduler_core.service.managed.schemas import (
    Announcement,
    InstanceBody,
    InstanceList,
    InstanceState,
    Reported,
    ReservationState,
    Reserved,
)
from kairos.scheduler_core.service.problems import RequestIdPath, problem_responses
from kairos.scheduler_core.slo import NO_TARGET_S

if TYPE_CHECKING:
    from kairos.scheduler_core.service.managed.part import Managed

InstanceId = Annotated[
    str, Path(min_length=1, max_length=128, pattern=r"^[^/\x00-\x1f]+$", description="Of the instance.")
]
_AWAY = "The database is away, and this is not known without it."
_UNKNOWN = "No such request is announced here."
_NO_INSTANCE = "No such instance is in the live fleet."
Problems = dict[int | str, dict[str, Any]]


def managed_routes(managed: "Managed") -> Sequence[BaseRoute]:
    """The routes over one part."""
    requests, instances = APIRouter(tags=["requests"]), APIRouter(tags=["instances"])
    _add_requests(requests, managed)
    _add_instances(instances, managed)
    return [*requests.routes, *instances.routes]


def _add_requests(router: APIRouter, managed: "Managed") -> None:
    @router.post(
        "/requests",
        status_code=201,
        responses=problem_responses(
            s404="Nothing in the fleet serves its model.",
            s409="Another request was announced under this id.",
            s429="Not admitted: the tenant is over its share, or there are too many reservations; see Retry-After.",
            s503="Not admitted: lost on arrival, or no instance takes requests now; see Retry-After.",
        ),
    )
    def announce_request(asked: Announcement, request: Request) -> Reserved:
        """Announce a request: where it goes, and what is predicted. It counts as load at once."""
        tenant = tenant_of(request.scope)
        if tenant is not None and asked.tenant not in ("", tenant):
            raise HTTPException(403, f"this key is tenant {tenant}'s; announce its requests only")
        reservation, stored = managed.announce(asked if tenant is None else asked.model_copy(update={"tenant": tenant}))
        return _reserved(managed, reservation, stored)

    @router.post("/requests/{request_id:path}/events", responses=problem_responses(s404=_UNKNOWN, s503=_AWAY))
    def report_event(request_id: RequestIdPath, told: Reported, request: Request) -> ReservationState:
        """Report what happened to an announced request; this keeps its reservation alive."""
        return _state(*managed.report(request_id, told, tenant_of(request.scope)))

    @router.delete("/requests/{request_id:path}", responses=problem_responses(s404=_UNKNOWN, s503=_AWAY))
    def release_request(request_id: RequestIdPath, request: Request) -> ReservationState:
        """Release a request that goes elsewhere: it is load no more."""
        return _state(*managed.release(request_id, tenant_of(request.scope)))


def _add_instances(router: APIRouter, managed: "Managed") -> None:
    fleet = managed.fleet
    away = problem_responses(s503="The database is away; nothing was changed.")
    known = away | problem_responses(s404=_NO_INSTANCE)

    @router.get("/instances")
    def list_instances() -> InstanceList:
        """List the live fleet."""
        return InstanceList(instances=[_instance(managed, member) for member in fleet.members.values()])

    @router.get("/instances/{instance_id}", responses=problem_responses(s404=_NO_INSTANCE))
    def show_instance(instance_id: InstanceId) -> InstanceState:
        """Show an instance."""
        return _instance(managed, fleet.get(instance_id))

    @router.put("/instances/{instance_id}", responses=away)
    def put_instance(instance_id: InstanceId, told: InstanceBody) -> InstanceState:
        """Take an instance in, or tell of it anew; it gets requests once its address is good."""
        return _instance(managed, fleet.put(instance_id, told))

    @router.post("/instances/{instance_id}/drain", responses=known)
    def drain_instance(instance_id: InstanceId) -> InstanceState:
        """Give an instance no new requests; those that it has go on."""
        return _instance(managed, fleet.drain(instance_id))

    @router.delete("/instances/{instance_id}", status_code=202, responses=known)
    def remove_instance(instance_id: InstanceId) -> InstanceState:
        """Drain an instance and let it go: what is left there then ends as instance_gone."""
        return _instance(managed, fleet.drain(instance_id, time.time() + managed.drain_s))


def _reserved(managed: "Managed", reservation: Reservation, stored: bool) -> Reserved:
    terms, members = reservation.terms, managed.fleet.members
    prefill, decode = members.get(terms.prefill_instance), members.get(terms.decode_instance)
    target_s = NO_TARGET_S if terms.ttft_target_s is None else terms.ttft_target_s
    return Reserved(
        request_id=terms.request_id,
        prefill_instance=terms.prefill_instance,
        decode_instance=terms.decode_instance or None,
        prefill_url=prefill.told.url if prefill else None,
        decode_url=decode.told.url if decode else None,
        predicted_prefill_s=terms.predicted_prefill_s,
        predicted_ttft_s=terms.predicted_ttft_s,
        predicted_tpot_s=terms.predicted_tpot_s,
        on_time=terms.predicted_ttft_s <= target_s,
        ttl_s=terms.ttl_s,
        decision_id=terms.decision_id,
        strategy=terms.strategy,
        model_version=terms.model_version,
        stored=stored,
    )


def _state(reservation: Reservation, stored: bool) -> ReservationState:
    progress = reservation.progress
    end = progress.holds
    return ReservationState(
        request_id=reservation.terms.request_id,
        stage=reservation.stage,
        ended=None if end is None else end.how,
        output_tokens=progress.output_tokens,
        expires_at_s=progress.expires_at_s,
        stored=stored,
    )


def _instance(managed: "Managed", member: Member) -> InstanceState:
    return InstanceState(
        instance_id=member.instance_id,
        state=managed.fleet.state_of(member),
        gone_at_s=member.gone_at_s,
        source=member.source,
        reservations=len(managed.book.load.members.get(member.instance_id, ())),
        told=member.told,
    )

"""Each admission rule, with the seconds of Retry-After worked out by hand."""

import pytest
from builders import waiting

from kairos.policies.admission.accept_all import AcceptAll
from kairos.policies.admission.on_arrival import OnArrival
from kairos.policies.admission.tenant_share import TenantShare
from kairos.scheduler_core.policy import Admission, AdmissionPolicy, AdmissionView
from kairos.scheduler_core.slo import NO_TARGET_S


def asked(
    policy: AdmissionPolicy,
    now_s: float = 0.0,
    *,
    tenant: str = "a",
    prefill_s: float = 1.0,
    ttft_target_s: float = 2.0,
    predicted_ttft_s: float = float("nan"),
    others_waiting: int = 1,
) -> Admission:
    request = waiting("r", prefill_s, arrival_s=now_s, ttft_target_s=ttft_target_s, tenant=tenant)
    return policy.admit(AdmissionView(now_s, request, predicted_ttft_s, others_waiting))


def lost_for(seconds: int) -> Admission:
    return Admission(accept=False, status=503, reason="lost_on_arrival", retry_after_s=seconds)


def over_share_for(seconds: int) -> Admission:
    return Admission(accept=False, status=429, reason="over_tenant_share", retry_after_s=seconds)


ACCEPTED = Admission(accept=True)


def test_accept_all_takes_a_request_that_is_lost_on_arrival() -> None:
    assert asked(AcceptAll(), predicted_ttft_s=1e9, others_waiting=10_000) == ACCEPTED


@pytest.mark.parametrize(
    ("predicted_ttft_s", "expected"),
    [
        (2.0, ACCEPTED),  # just in time
        (2.1, lost_for(1)),  # 0.1 s too late, rounded up
        (5.5, lost_for(4)),  # 3.5 s too late, rounded up
        (5.0, lost_for(3)),
        (500.0, lost_for(60)),  # at most a minute
    ],
)
def test_on_arrival_refuses_who_is_late_by_prediction_until_the_queue_has_drained(
    predicted_ttft_s: float, expected: Admission
) -> None:
    assert asked(OnArrival(), predicted_ttft_s=predicted_ttft_s) == expected


def test_on_arrival_with_patience_lets_a_request_be_late_by_so_many_targets() -> None:
    assert asked(OnArrival(patience=3.0), predicted_ttft_s=6.0) == ACCEPTED
    assert asked(OnArrival(patience=3.0), predicted_ttft_s=8.5) == lost_for(3)


def test_on_arrival_takes_whoever_has_no_target() -> None:
    assert asked(OnArrival(), predicted_ttft_s=500.0, ttft_target_s=NO_TARGET_S) == ACCEPTED


def test_on_arrival_needs_a_prediction_and_the_others_do_not() -> None:
    assert [policy.needs_prediction for policy in (OnArrival(), TenantShare(), AcceptAll())] == [True, False, False]


def test_tenant_share_refuses_a_tenant_over_its_share_until_the_bucket_covers_the_request() -> None:
    policy = TenantShare({"a": 0.5}, window_s=4.0)  # a full bucket: 0.5 x 4 = 2 s

    first, second, third = (asked(policy, prefill_s=1.0) for _ in range(3))

    # nothing is left: 1 s at 0.5 a second comes in 2 s
    assert [first, second, third] == [ACCEPTED, ACCEPTED, over_share_for(2)]


def test_tenant_share_takes_it_at_the_second_it_promised_and_not_before() -> None:
    def after(seconds: float) -> bool:
        policy = TenantShare({"a": 0.5}, window_s=4.0)
        asked(policy, 100.0, prefill_s=2.0)
        return asked(policy, 100.0 + seconds, prefill_s=1.0).accept

    assert [after(1.9), after(2.0)] == [False, True]


def test_tenant_share_refuses_nobody_while_no_one_else_waits() -> None:
    policy = TenantShare({"a": 0.5}, window_s=4.0)

    assert asked(policy, prefill_s=50.0, others_waiting=0) == ACCEPTED
    # what it took beyond its share is owed: 48 s + 1 s at 0.5 a second, at most a minute
    assert asked(policy, prefill_s=1.0) == over_share_for(60)


def test_tenant_share_takes_a_request_longer_than_its_window_once_the_bucket_is_full() -> None:
    policy = TenantShare({"a": 0.5}, window_s=4.0)  # a full bucket: 2 s
    asked(policy, 0.0, prefill_s=1.0)

    assert asked(policy, 0.0, prefill_s=30.0) == over_share_for(2)
    assert asked(policy, 2.0, prefill_s=30.0) == ACCEPTED


def test_tenant_share_of_one_tenant_does_not_touch_another() -> None:
    policy = TenantShare({"a": 0.5, "b": 0.5}, window_s=4.0)
    asked(policy, tenant="a", prefill_s=2.0)

    assert asked(policy, tenant="b", prefill_s=2.0) == ACCEPTED
    assert asked(policy, tenant="a", prefill_s=2.0) == over_share_for(4)


def test_tenant_share_gives_a_tenant_that_is_not_named_the_default_share() -> None:
    policy = TenantShare({"a": 0.5}, window_s=10.0, default_share=0.1)  # a stranger's bucket: 1 s

    assert asked(policy, tenant="stranger", prefill_s=1.0) == ACCEPTED
    assert asked(policy, tenant="stranger", prefill_s=0.5) == over_share_for(5)


def test_tenant_share_saves_up_no_more_than_its_window() -> None:
    policy = TenantShare({"a": 0.5}, window_s=4.0)
    asked(policy, 0.0, prefill_s=2.0)

    assert asked(policy, 1_000.0, prefill_s=1.5) == ACCEPTED
    assert asked(policy, 1_000.0, prefill_s=1.0) == over_share_for(1)

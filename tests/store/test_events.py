"""`GET /events`: the newest first, page by page; the same on both databases."""

from typing import Any

from service.snapshots import call
from store.test_telemetry_routes import serving

from kairos.scheduler_core.service.store.queries.events import add_event
from kairos.scheduler_core.service.store.session import Store


def test_events_are_listed_with_the_newest_first_and_each_once_over_the_pages(store: Store) -> None:
    with store.write() as connection:
        for number in range(5):
            add_event(connection, "drift", f"profile-{number}", {"number": number})
    pages: list[Any] = []
    with serving(store) as app:
        before: int | None = None
        while not pages or before:
            query = {"limit": 2} | ({"before": before} if before else {})
            pages.append(call(app, "GET", "/events", params=query).json())
            before = pages[-1]["before"]

    assert [[event["subject"] for event in page["events"]] for page in pages] == [
        ["profile-4", "profile-3"],
        ["profile-2", "profile-1"],
        ["profile-0"],
    ]
    assert pages[0]["events"][0]["detail"] == {"number": 4}
    assert pages[0]["events"][0]["at"].endswith("Z")


def test_without_events_the_list_is_empty(store: Store) -> None:
    with serving(store) as app:
        assert call(app, "GET", "/events").json() == {"events": [], "before": None}


def test_a_page_that_cannot_be_is_refused_by_name(store: Store) -> None:
    with serving(store) as app:
        answer = call(app, "GET", "/events", params={"limit": 0, "before": 0})

    assert [error["path"] for error in answer.json()["errors"]] == ["limit", "before"]

"""Reading what a plain message wants sent when its job is over."""

from __future__ import annotations

import json

import pytest
from celery import Celery, chain, chord, group

from worker.jobs.links import MAX_LINKS_BYTES, MAX_NESTED, MAX_SIGNATURES, Links, UnusableLinks, read_links

app = Celery("other", set_as_current=False)
TASK = app.signature("note", queue="elsewhere")


def as_sent(value: object) -> object:
    """What JSON leaves of Celery's own classes."""
    return json.loads(json.dumps(value))


def nested(depth: int) -> object:
    signature: object = as_sent(TASK)
    for _ in range(depth):
        signature = {"task": "note", "options": {"link": [signature]}}
    return signature


def test_what_celery_writes_is_read_and_kept_as_it_is() -> None:
    linked = TASK.clone()
    linked.link(TASK.clone(args=("mine",)))
    for signature in (TASK, linked, group(TASK, TASK), chain(TASK, TASK), chain(TASK, group(TASK, TASK))):
        said = as_sent(signature)
        links = read_links({"callbacks": [said], "errbacks": None, "chain": [said, said], "chord": None}, "root")
        assert links == Links(callbacks=(said,), chain=(said, said), root_id="root")  # type: ignore[arg-type]
        assert Links.from_json(links.to_json()) == links


def test_one_signature_that_is_no_list_is_a_list_of_one() -> None:
    assert read_links({"errbacks": {"task": "note"}}) == Links(errbacks=({"task": "note"},))


@pytest.mark.parametrize(
    "embed",
    [
        {"chord": as_sent(TASK)},
        {"callbacks": [as_sent(chord([TASK, TASK], TASK))]},
        {"chain": [as_sent(chain(group(TASK, TASK), TASK))]},
        {"chain": [{"task": "celery.chain", "subtask_type": "chain", "kwargs": {"tasks": [
            as_sent(group(TASK, TASK)), as_sent(TASK)]}}]},
        {"errbacks": [{"task": "note", "options": {"link": [as_sent(chord([TASK, TASK], TASK))]}}]},
        {"chain": [{"task": "note", "options": {"chord": as_sent(TASK)}}]},
        {"callbacks": [{"task": "celery.chord"}]},
    ],
)  # fmt: skip
def test_a_chord_is_refused_by_name_wherever_it_stands(embed: object) -> None:
    with pytest.raises(UnusableLinks, match=r"^chord: not served here"):
        read_links(embed)


@pytest.mark.parametrize(
    ("embed", "said"),
    [
        ({"callbacks": "x"}, "link: a list of signatures is required, got str"),
        ({"callbacks": [1]}, "link: a signature is required, got int"),
        ({"callbacks": [{"task": "note", "args": ["\ud800"]}]}, "link: half a character in a signature"),
        ({"errbacks": [{}]}, "link_error: a signature without the name of its task"),
        ({"errbacks": [{"task": "x" * 300}]}, "link_error: a signature without the name of its task"),
        ({"chain": [{"task": "note", "args": {}}]}, "chain: args of 'note' are of type dict"),
        ({"chain": [{"task": "note", "kwargs": []}]}, "chain: kwargs of 'note' are of type list"),
        ({"chain": [{"task": "note", "options": 1}]}, "chain: options of 'note' are of type int"),
        ({"chain": [{"task": "note", "options": {"link": 1}}]}, "chain: a list of signatures is required, got int"),
        ({"callbacks": [{"task": "note", "subtask_type": "group"}]}, "link: a group without tasks"),
        ({"callbacks": [{"task": "celery.map", "subtask_type": "xmap"}]}, "link: 'xmap' is not sent from here"),
        ({"callbacks": [{"task": "note"}] * (MAX_SIGNATURES + 1)}, "link: more signatures than the limit of 100"),
        ({"callbacks": [nested(MAX_NESTED + 1)]}, f"link: signatures within signatures, the limit is {MAX_NESTED}"),
        ({"callbacks": [{"task": "note", "args": ["x" * MAX_LINKS_BYTES]}]}, "link: 65"),
    ],
)  # fmt: skip
def test_what_cannot_be_sent_names_the_part(embed: object, said: str) -> None:
    with pytest.raises(UnusableLinks) as raised:
        read_links(embed)
    assert str(raised.value).startswith(said)
    assert raised.value.usable is None


def test_the_limits_themselves_are_allowed() -> None:
    assert read_links({"callbacks": [nested(MAX_NESTED)]}) is not None
    assert read_links({"callbacks": [{"task": "note"}] * MAX_SIGNATURES}) is not None


def test_the_followers_of_a_job_are_the_tasks_behind_it_in_its_chain() -> None:
    signatures = [{"task": "note", "options": {"task_id": name}} for name in "abc"]
    both = {
        "task": "celery.group",
        "subtask_type": "group",
        "options": {"task_id": "g"},
        "kwargs": {"tasks": signatures},
    }
    links = read_links({"callbacks": signatures, "errbacks": signatures, "chain": [both, {"task": "note"}]})
    assert links is not None
    assert links.followers() == ["g", "a", "b", "c"]

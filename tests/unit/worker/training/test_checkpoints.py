"""Checkpoints of an output: whole or not at all, in a folder and in S3, and by one attempt only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from api_stub.contract.finetune import FinetuneMethod, FinetuneRecipe
from tests.servers import S3Server
from worker.training.checkpoints import Checkpoints
from worker.training.manifest import LATEST, MANIFEST, Manifest, Plan, describe_files, digest_of
from worker.training.objects import FolderObjects, Objects, S3Objects, open_objects
from worker.training.progress import Stopped, StopReason, TrainingRefused

PLAN = Plan(
    base="demo", base_digest="b", data="d", method=FinetuneMethod.FULL, recipe=FinetuneRecipe.CHAT, seed=0,
    max_steps=9, batch_size=1, gradient_accumulation=1, learning_rate=0.1, warmup_steps=0, weight_decay=0.0,
    max_grad_norm=1.0, gradient_checkpointing=False, eval_every=3, eval_examples=1, max_new_tokens=4,
)  # fmt: skip


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Objects]:
    """An empty place, opened anew by every attempt."""
    if request.param == "folder":
        return lambda: open_objects(str(tmp_path / "output"))
    server: S3Server = request.getfixturevalue("s3_server")
    client = server.client()
    bucket = f"training-{abs(hash(tmp_path))}"
    client.create_bucket(Bucket=bucket)
    return lambda: open_objects(f"s3://{bucket}/run", client)


def draft(folder: Path, step: int) -> tuple[Path, Manifest]:
    """Files of a checkpoint whose weights tell the step."""
    (folder / "state").mkdir(parents=True)
    (folder / "model.safetensors").write_text(f"weights of step {step}")
    (folder / "state" / "run.json").write_text(f"{step}")
    files = describe_files(folder)
    return folder, Manifest(step=step, checkpoint=digest_of(files), files=files, plan=PLAN)


def commit(checkpoints: Checkpoints, folder: Path, step: int, best: int | None = None) -> str:
    return checkpoints.commit(*draft(folder / f"draft-{step}", step), best)


def latest(objects: Objects) -> dict[str, object]:
    stored = objects.read(LATEST)
    assert stored is not None
    found: dict[str, object] = json.loads(stored[0])
    return found


def test_the_newest_checkpoint_comes_back_with_every_file(place: Callable[[], Objects], tmp_path: Path) -> None:
    checkpoints = Checkpoints(place())
    checkpoints.claim()
    assert checkpoints.newest(tmp_path) is None
    commit(checkpoints, tmp_path, 3)
    uri = commit(checkpoints, tmp_path, 6, best=3)
    found = Checkpoints(place()).newest(tmp_path)
    assert found is not None
    assert found.uri == uri
    assert found.manifest.step == 6
    assert found.manifest.plan == PLAN
    assert (found.folder / "model.safetensors").read_text() == "weights of step 6"
    assert (found.folder / "state" / "run.json").read_text() == "6"
    assert latest(place()) == {
        "v": 1, "claim": 1, "job": "", "fence": 0, "step": 6, "checkpoint": "checkpoint-6", "best": "checkpoint-3",
    }  # fmt: skip


@pytest.mark.parametrize("fault", ["manifest missing", "file missing", "file changed", "manifest cut"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(
    place: Callable[[], Objects], tmp_path: Path, fault: str
) -> None:
    checkpoints = Checkpoints(place())
    checkpoints.claim()
    commit(checkpoints, tmp_path, 3)
    commit(checkpoints, tmp_path, 6)
    other = tmp_path / "other"
    other.write_text('{"v": 1' if fault == "manifest cut" else "weights of step 7")
    match fault:
        case "manifest missing":
            place().delete(f"checkpoint-6/{MANIFEST}")
        case "file missing":
            place().delete("checkpoint-6/state/run.json")
        case "file changed":
            place().upload(other, "checkpoint-6/model.safetensors")
        case _:
            place().upload(other, f"checkpoint-6/{MANIFEST}")
    found = Checkpoints(place()).newest(tmp_path)
    assert found is not None
    assert found.manifest.step == 3


def test_an_output_whose_only_checkpoint_is_broken_is_refused(place: Callable[[], Objects], tmp_path: Path) -> None:
    checkpoints = Checkpoints(place())
    checkpoints.claim()
    commit(checkpoints, tmp_path, 3)
    place().delete("checkpoint-3/model.safetensors")
    with pytest.raises(TrainingRefused, match="none of its 1 checkpoints is whole"):
        Checkpoints(place()).newest(tmp_path)


def test_an_attempt_that_was_superseded_commits_nothing(place: Callable[[], Objects], tmp_path: Path) -> None:
    older, newer = (Checkpoints(place(), job="job", fence=fence) for fence in (4, 5))
    older.claim()
    commit(older, tmp_path, 3)
    newer.claim()
    with pytest.raises(Stopped) as stopped:
        commit(older, tmp_path, 6)
    assert stopped.value.reason is StopReason.LOST
    assert latest(place())["checkpoint"] == "checkpoint-3"
    assert Checkpoints(place()).steps() == [3]


def test_an_older_attempt_cannot_take_over_from_a_newer_one(place: Callable[[], Objects]) -> None:
    Checkpoints(place(), job="job", fence=5).claim()
    with pytest.raises(Stopped):
        Checkpoints(place(), job="job", fence=4).claim()
    Checkpoints(place(), job="another job", fence=1).claim()


def test_a_claim_between_the_check_and_the_write_is_noticed(place: Callable[[], Objects], tmp_path: Path) -> None:
    objects = place()
    checkpoints = Checkpoints(objects, job="job", fence=1)
    checkpoints.claim()
    write_if = objects.write_if

    def claimed_meanwhile(name: str, content: bytes, tag: str | None) -> bool:
        Checkpoints(place(), job="job", fence=2).claim()
        return write_if(name, content, tag)

    objects.write_if = claimed_meanwhile  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        commit(checkpoints, tmp_path, 3)
    assert latest(place())["fence"] == 2
    assert "checkpoint" not in latest(place())


@pytest.mark.parametrize("lost", [1, 3, 4])
def test_a_write_whose_answer_was_lost_is_no_other_attempts(
    place: Callable[[], Objects], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """The client repeats it, and meets its own. By number: the trial's first write, the claim, the commit."""
    objects, count = place(), 0
    write_if = objects.write_if

    def repeated(name: str, content: bytes, tag: str | None) -> bool:
        nonlocal count
        count += 1
        if count == lost:
            write_if(name, content, tag)
        return write_if(name, content, tag)

    monkeypatch.setattr(objects, "write_if", repeated)
    checkpoints = Checkpoints(objects, job="a", fence=1)
    checkpoints.claim()
    commit(checkpoints, tmp_path, 3)
    assert count >= lost
    assert latest(place())["step"] == 3


def test_the_newest_checkpoints_and_the_best_are_kept(place: Callable[[], Objects], tmp_path: Path) -> None:
    checkpoints = Checkpoints(place(), save_total_limit=2)
    checkpoints.claim()
    for step in (3, 6, 9, 12):
        commit(checkpoints, tmp_path, step, best=3)
        checkpoints.prune(best_step=3)
    assert checkpoints.steps() == [3, 9, 12]
    assert {name.split("/")[0] for name in place().names()} - {LATEST} == {
        "checkpoint-3", "checkpoint-9", "checkpoint-12",
    }  # fmt: skip


@pytest.mark.parametrize("kind", [FolderObjects, S3Objects])
def test_a_store_that_ignores_conditions_is_refused(
    kind: type, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is FolderObjects:
        objects: Objects = FolderObjects(tmp_path)
        monkeypatch.setattr(objects, "write_if", lambda *_: True)
    else:
        client = s3_server.client()
        client.create_bucket(Bucket="ignores-conditions")
        objects = open_objects("s3://ignores-conditions/run/", client)
        put = client.put_object
        monkeypatch.setattr(client, "put_object", lambda IfNoneMatch="", **rest: put(**rest))  # noqa: N803
    with pytest.raises(TrainingRefused, match="ignores conditional writes"):
        Checkpoints(objects).claim()


def test_a_manifest_cannot_name_files_outside_of_its_checkpoint(tmp_path: Path) -> None:
    objects = open_objects(str(tmp_path / "output"))
    checkpoints = Checkpoints(objects)
    checkpoints.claim()
    commit(checkpoints, tmp_path, 3)
    manifest = tmp_path / "output" / "checkpoint-3" / MANIFEST
    manifest.write_text(manifest.read_text().replace("model.safetensors", "../../../escaped"))
    with pytest.raises(TrainingRefused):
        checkpoints.newest(tmp_path / "work")
    assert not (tmp_path / "escaped").exists()

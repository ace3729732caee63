"""The two distributions, built and installed as users do: their files, and a stranger's `worker` beside them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from api_stub.devstack.child import StackFailed
from api_stub.devstack.servers import worker_command

ROOT = Path(__file__).parent.parent.parent
MAX_PRODUCER_BYTES = 400_000
LEARNING = "worker/demo_model/learning"
HEADERS = (
    "Name",
    "Version",
    "Requires-Dist",
    "License-Expression",
    "License-File",
    "Classifier",
    "Description-Content-Type",
)
STRANGER = "raise SystemExit('a stranger was run')\n"


def tracked(*patterns: str) -> set[str]:
    """Return the repository's files of these patterns; new ones that git does not ignore count."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", *patterns]
    listed = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def build(source: Path, place: Path) -> Path:
    """Build one wheel with the tools of this environment."""
    place.mkdir()
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", place, source], check=True, timeout=120)
    (wheel,) = place.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone has, with what running it leaves behind."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked("api_stub", "worker", "pyproject.toml", "LICENSE", ".gitignore"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    for package in ("api_stub", "worker"):
        (folder / package / "__pycache__").mkdir()
        (folder / package / "__pycache__" / "left.cpython-311.pyc").touch()
    return folder


@pytest.fixture(scope="module")
def wheels(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The producer's wheel and the worker's, each built a second time over the first."""
    before, place = files_in(checkout), tmp_path_factory.mktemp("wheels")
    for number in range(2):
        producer, worker = (
            build(checkout, place / f"visionq-{number}"),
            build(checkout / "worker", place / f"worker-{number}"),
        )
        assert files_in(checkout) == before, "a build leaves files behind"
    return producer, worker


def metadata(wheel: Path) -> dict[str, list[str]]:
    """Return a wheel's headers with their values, and its long description as `Description`."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        message = Parser().parsestr(archive.read(name).decode())
    headers = {key: message.get_all(key) or [] for key in HEADERS}
    return headers | {"Description": [str(message.get_payload())]}


def test_every_file_is_in_its_wheel_but_what_trained_the_demo_model(wheels: tuple[Path, Path]) -> None:
    for wheel, package in zip(wheels, ("api_stub", "worker"), strict=True):
        held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        assert held == tracked(package, f":!{LEARNING}"), package
    assert tracked(LEARNING)


@pytest.mark.check
def test_a_wheel_that_is_built_from_a_source_archive_holds_the_same_files(
    checkout: Path, wheels: tuple[Path, Path], tmp_path: Path
) -> None:
    for wheel, source in zip(wheels, (checkout, checkout / "worker"), strict=True):
        place = tmp_path / wheel.stem
        command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", place]
        subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
        (archive,) = place.iterdir()
        rebuilt = build(archive, tmp_path / f"{wheel.stem}-rebuilt")
        assert set(zipfile.ZipFile(rebuilt).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_the_producers_wheel_is_light(wheels: tuple[Path, Path]) -> None:
    assert wheels[0].stat().st_size < MAX_PRODUCER_BYTES
    needed = {
        line.split(";")[0].split(">")[0] for line in metadata(wheels[0])["Requires-Dist"] if "extra ==" not in line
    }
    assert needed == {"redis", "pydantic", "pydantic-settings", "boto3", "typer", "rich"}


def test_both_have_one_version_and_the_worker_needs_that_producer(wheels: tuple[Path, Path]) -> None:
    producer, worker = map(metadata, wheels)
    assert producer["Version"] == worker["Version"]
    assert f"visionq=={producer['Version'][0]}" in worker["Requires-Dist"]
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert producer["Version"] == [built]


def test_both_say_on_a_package_index_what_they_are(wheels: tuple[Path, Path]) -> None:
    for wheel, name in zip(wheels, ("visionq", "visionq-worker"), strict=True):
        said = metadata(wheel)
        assert said["License-Expression"] == ["Apache-2.0"]
        assert said["License-File"] == ["LICENSE"]
        assert "Typing :: Typed" in said["Classifier"]
        assert said["Description-Content-Type"] == ["text/markdown"]
        (description,) = said["Description"]
        assert description.startswith(f"# {name}\n")
        assert re.findall(r"\]\((?!https://)[^)]*\)", description) == [], "a link that leads nowhere there"
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / "worker" / "LICENSE").read_bytes()


@pytest.fixture
def bare(wheels: tuple[Path, Path], tmp_path: Path) -> Path:
    """An environment with all libraries and the producer's wheel, but no worker. Returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=60)
    python = tmp_path / "venv/bin/python"
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "visionq" not in path.name:
            (packages / path.name).symlink_to(path)
    install = ["install", "--no-deps", "--quiet", "--disable-pip-version-check", str(wheels[0])]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True, timeout=60)
    return python


def run(command: list[str | Path], folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | extra
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=60, check=False)


PRODUCER = """
import worker
import api_stub
from api_stub import Client
assert worker.MINE, "my own module"
job = Client().vqa("s3://media/scene.png", question="What colour is the circle?")
print(job.status().status, api_stub.__file__)
"""


def test_a_producer_with_a_worker_of_its_own_uses_visionq(bare: Path, redis_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "worker.py").write_text("MINE = True\n")
    (folder / "enqueue.py").write_text(PRODUCER)
    done = run([bare, "enqueue.py"], folder, VISIONQ_REDIS_URL=redis_url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("queued ")
    assert str(tmp_path / "venv") in done.stdout


@pytest.mark.parametrize("command", [["demo"], ["draw", "scene.png"]], ids=lambda command: command[0])
def test_visionq_runs_no_strangers_worker(bare: Path, tmp_path: Path, command: list[str]) -> None:
    folder = tmp_path / "shop"
    (folder / "worker").mkdir(parents=True)
    for name in ("__init__", "cli", "demo_model"):
        (folder / "worker" / f"{name}.py").write_text(STRANGER)
    done = run([bare.parent / "visionq", *command], folder, PYTHONPATH=str(folder))
    assert done.returncode != 0
    assert "visionq-worker is not installed" in done.stdout + done.stderr
    assert "stranger" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_strangers_worker_in_front_of_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(STRANGER)
    with pytest.raises(StackFailed, match=r"worker\.py.*PYTHONPATH"):
        worker_command("worker.cli", [str(tmp_path), *sys.path])
    with pytest.raises(StackFailed, match="nowhere"):
        worker_command("worker.cli", [str(tmp_path / "empty")])
    assert worker_command("worker.cli", [str(ROOT)])[-2:] == ["-m", "worker.cli"]


def test_visionq_worker_starts_where_a_worker_py_lies(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(STRANGER)
    done = run([Path(sysconfig.get_path("scripts")) / "visionq-worker", "start", "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--devices" in done.stdout

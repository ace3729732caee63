"""Asks PyPI's advisory service about every pinned dependency: `make audit`.

Fails for a known vulnerability. Where the service cannot be reached, or the index that answers has no advisories, it
says that nothing was audited and succeeds: a machine without a network must be able to run the checks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_S = 300
COMMAND = (
    sys.executable, "-m", "pip_audit", "--requirement", str(ROOT / "constraints.txt"), "--no-deps", "--disable-pip",
    "--format", "json", "--progress-spinner", "off", "--timeout", "10",
)  # fmt: skip


def audit() -> tuple[int, str]:
    """Return the exit status and what to print."""
    try:
        asked = subprocess.run(COMMAND, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        return judged(json.loads(asked.stdout)["dependencies"])
    except subprocess.TimeoutExpired:
        return 0, f"NOT AUDITED: no answer within {LIMIT_S} s"
    except json.JSONDecodeError:
        return 0, f"NOT AUDITED: {(asked.stderr.strip() or 'no answer').splitlines()[-1]}"


def judged(dependencies: list[dict[str, Any]]) -> tuple[int, str]:
    """Return the exit status and what to print for pip-audit's findings."""
    audited = [found for found in dependencies if "skip_reason" not in found]
    skipped = sorted(found["name"] for found in dependencies if "skip_reason" in found)
    lines = [
        f"{found['name']} {found['version']}: {advisory['id']}, fixed in {advisory['fix_versions'] or 'no version yet'}"
        for found in audited
        for advisory in found["vulns"]
    ]
    if not audited:
        return 0, "NOT AUDITED: the advisory service knows none of the pinned packages"
    said = f"{len(audited)} pinned packages audited, {len(lines)} known vulnerabilities"
    rest = f"; not audited: {', '.join(skipped)}" if skipped else ""
    return int(bool(lines)), "\n".join([*lines, said + rest])


if __name__ == "__main__":
    status, words = audit()
    sys.stdout.write(words + "\n")
    sys.exit(status)

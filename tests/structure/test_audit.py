"""The audit fails for what is known to be bad, and never says that all is well when nobody was asked."""

from __future__ import annotations

from tests.structure.audit import judged

GOOD = {"name": "good", "version": "1", "vulns": []}
BAD = {"name": "bad", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "unknown", "skip_reason": "Dependency not found"}


def test_a_known_vulnerability_fails_by_name() -> None:
    status, words = judged([GOOD, BAD, UNKNOWN])
    assert status == 1
    assert "bad 2: PYSEC-1" in words
    assert "not audited: unknown" in words


def test_nothing_known_is_a_success_that_says_what_was_asked() -> None:
    assert judged([GOOD]) == (0, "1 pinned packages audited, 0 known vulnerabilities")


def test_nothing_audited_is_said_loudly() -> None:
    status, words = judged([UNKNOWN])
    assert status == 0
    assert words.startswith("NOT AUDITED")

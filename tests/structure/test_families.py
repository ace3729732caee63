"""`docs/families.md` is what is found out here; rows of families that need torchvision are checked in tests/vision."""

from __future__ import annotations

import pytest

from tests.families_table import PAGE, decoder_rows, family_row, read
from tests.tiny.every_family import WITH_TORCHVISION, WITHOUT_TORCHVISION

pytestmark = pytest.mark.check

MEND = "run: python -m tests.families_table --write"


def test_the_page_has_every_family_and_no_other() -> None:
    assert tuple(read(PAGE.read_text(), "families")) == (*WITHOUT_TORCHVISION, *WITH_TORCHVISION), MEND


@pytest.mark.parametrize("name", WITHOUT_TORCHVISION)
def test_what_the_page_says_of_a_family_is_what_is_found(name: str) -> None:
    assert read(PAGE.read_text(), "families")[name] == family_row(name), MEND


def test_what_the_page_says_of_text_decoders_is_what_is_found() -> None:
    rows = read(PAGE.read_text(), "decoders")
    assert [row for row in decoder_rows() if rows.get(row[0]) != row] == [], MEND

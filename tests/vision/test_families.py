"""`docs/families.md` is what is found out here, for the families that need torchvision."""

from __future__ import annotations

import pytest

from tests.families_table import PAGE, family_row, read, torchvision_decoder_rows
from tests.structure.test_families import MEND
from tests.tiny.every_family import WITH_TORCHVISION


@pytest.mark.parametrize("name", WITH_TORCHVISION)
def test_what_the_page_says_of_a_family_is_what_is_found(name: str) -> None:
    assert read(PAGE.read_text(), "families")[name] == family_row(name), MEND


def test_what_the_page_says_of_text_decoders_is_what_is_found() -> None:
    rows = read(PAGE.read_text(), "decoders")
    assert [row for row in torchvision_decoder_rows() if rows.get(row[0]) != row] == [], MEND

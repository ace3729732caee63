"""Every tiny checkpoint by its family's name."""

from __future__ import annotations

from pathlib import Path

from tests.tiny.families import FAMILIES, build
from tests.tiny.more_families import MORE_FAMILIES, MORE_VISION_FAMILIES, build_more
from tests.tiny.torchvision_families import VIDEO_FAMILIES, build_with_video


def build_any(name: str, directory: Path) -> Path:
    """Save the tiny checkpoint of family `name` into `directory` and return `directory`."""
    if name in FAMILIES:
        return build(name, directory)
    return (build_with_video if name in VIDEO_FAMILIES else build_more)(name, directory)


#: Families that load without torchvision, and those that do not.
WITHOUT_TORCHVISION = FAMILIES + MORE_FAMILIES
WITH_TORCHVISION = VIDEO_FAMILIES + MORE_VISION_FAMILIES

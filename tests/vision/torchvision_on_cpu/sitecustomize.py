"""Lets torchvision's wheel be imported beside a torch without CUDA. Python runs this itself, in workers too.

The wheel's compiled operators need CUDA libraries, and the import fails over their missing declarations. Declaring
them is enough: processors resize and normalise with torch alone and never call them.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

DETECTION = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []


class DeclareOperators(MetaPathFinder):
    """Declares the operators just before torchvision is first looked for; finds nothing itself."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                library = torch.library.Library("torchvision", "DEF")
                library.define(f"nms{DETECTION}")
                library.define(f"qnms{DETECTION}")
                _declared.append(library)


sys.meta_path.insert(0, DeclareOperators())

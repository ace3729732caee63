"""Adapters that are served beside their base: what does not fit is refused at start, by the adapter's name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.unit.worker.models.test_adapters import adapted, adapter, base, change_weights, rewrite, whole
from worker.errors import CannotStart
from worker.models.digests import folder_digest
from worker.models.loader import load
from worker.settings import WorkerSettings

__all__ = ["adapter", "base"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def refusal(base: Path, adapters: str) -> str:
    with pytest.raises(CannotStart) as refused:
        load(WorkerSettings(model=str(base), adapters=adapters))
    return str(refused.value)


def test_adapters_are_read_with_the_digest_of_their_weights(base: Path, tmp_path: Path) -> None:
    adapted(whole(base), tmp_path / "mine", base, r=4, target_modules=["q_proj"])
    loaded = load(WorkerSettings(model=str(base), adapters=f"one={tmp_path}/mine, two={tmp_path}/mine"))
    assert [(each.name, each.digest) for each in loaded.adapters] == [
        ("one", folder_digest(tmp_path / "mine")),
        ("two", folder_digest(tmp_path / "mine")),
    ]
    assert loaded.checkpoint == folder_digest(base)


def test_what_does_not_fit_is_refused_by_name(adapter: Path, base: Path) -> None:
    named = f"mine={adapter}"
    assert re.match(r"VISIONQ_ADAPTERS: mine=/nowhere: there is no folder /nowhere", refusal(base, "mine=/nowhere"))
    assert "VISIONQ_ADAPTERS: mine=" in refusal(base, f"mine={base}")
    assert "so it is no adapter" in refusal(base, f"mine={base}")
    manifest = adapter / "manifest.json"
    manifest.write_text(json.dumps({"v": 1, "plan": {"base_digest": "ab" * 32}}))
    words = rf"trained on other weights of {base}: their digest was (ab)+, \w+ are served"
    assert re.search(words, refusal(base, named))
    manifest.unlink()
    rewrite(adapter, r=3)
    assert "do not fit rank 3" in refusal(base, named)
    rewrite(adapter, r=4, bias="all")
    assert "bias 'all'" in refusal(base, named)
    rewrite(adapter, bias="none")
    change_weights(adapter, lambda found: {key.replace("layers.0", "layers.9"): value for key, value in found.items()})
    assert "is no module of" in refusal(base, named)


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        (",".join(f"a{number}=/x" for number in range(9)), "at most 8 adapters are served, got 9"),
        ("Red=/x", "name=checkpoint is required, got 'Red'"),
        ("red", "name=checkpoint is required, got 'red'"),
        ("red=/x,red=/y", "'red' is given twice"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused(adapters: str, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        WorkerSettings(adapters=adapters)

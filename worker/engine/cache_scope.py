"""What cached work depends on beside the prompt: keys of prefixes and of vision features begin with it.

Without it, keys and values that one checkpoint or adapter computed would be handed to another, whose answers they
would change without a sign.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Final

from worker.errors import InvalidRequest
from worker.models.inputs import LoadedAdapter

_KEY_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class CacheScope:
    """Cached work is shared within one scope, never beyond it.

    checkpoint: digest of the weights. adapter: digest of the LoRA adapter, empty for the base alone. salt: of the
    tenant, where nothing may be shared with others.
    """

    checkpoint: str = ""
    adapter: str = ""
    salt: str = ""

    @property
    def key(self) -> bytes:
        """The bytes with which a key begins: equal for equal scopes only."""
        return hashlib.blake2b(repr(astuple(self)).encode(), digest_size=_KEY_BYTES).digest()

    @property
    def of_tower(self) -> CacheScope:
        """The scope of what the vision tower returns, which no adapter changes: the engine takes none for towers."""
        return replace(self, adapter="")


class CacheScopes:
    """The scopes of one engine: its checkpoint's, and one per adapter. Any thread."""

    def __init__(self, checkpoint: str = "", adapters: Sequence[LoadedAdapter] = ()) -> None:
        self._scopes = {"": CacheScope(checkpoint)} | {
            adapter.name: CacheScope(checkpoint, adapter.digest) for adapter in adapters
        }

    def of(self, adapter: str) -> CacheScope:
        """Return the scope of an adapter; an empty name is the base's. Raises InvalidRequest for one not served."""
        scope = self._scopes.get(adapter)
        if scope is None:
            served = ", ".join(name for name in self._scopes if name) or "none"
            raise InvalidRequest(f"model: no adapter {adapter!r} is served here, only {served}")
        return scope

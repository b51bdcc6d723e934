"""What a score was measured under. Two scores compare only when their protocols are equal."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def digest(parts: Iterable[bytes]) -> str:
    """A short sha256 over a sequence of byte strings (captions, reference pictures)."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()[:16]


def protocol_id(protocol: dict[str, Any]) -> str:
    """Eight hex digits that name a protocol given as plain data."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:8]

"""What a score was measured under, as plain data. Two scores compare only when their protocols are equal.

A protocol says what pictures are compared with (n, side, resize, and digests of the captions and the reference), how they
were made (sampling, seed, weights ...), under which versions, and in `features` which networks looked at them.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from ldm.errors import UserError

COMPARED = ("n", "side", "resize", "captions", "reference", "features")  # what two comparable scores have in common


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


def versions() -> dict[str, str]:
    """Of what numbers depend on."""
    return {name: version(name).partition("+")[0] for name in ("ldm", "torch", "torchvision")}


def flat(protocol: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}."""
    out: dict[str, Any] = {}
    for key, value in protocol.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (in a, in b)} of all in which two protocols differ, ids aside; None where one lacks it."""
    one, other = flat(a), flat(b)
    names = [name for name in {**one, **other} if name != "id"]
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


def incomparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (in a, in b)} of what keeps scores under the two from standing side by side: only the way of making may
    differ, and a network that only one of them has."""
    shared = a.get("features", {}).keys() & b.get("features", {}).keys()
    one, other = ({**p, "features": {k: p["features"][k] for k in sorted(shared)} if shared else {}} for p in (a, b))
    return {k: v for k, v in differences(one, other).items() if k.partition(".")[0] in COMPARED}


def refuse_incomparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raises UserError unless scores under the two may stand side by side."""
    if wrong := incomparable(a, b):
        what = "; ".join(f"{name} is {x} and {y}" for name, (x, y) in wrong.items())
        raise UserError(
            f"scores under protocols {a.get('id', 'a')} and {b.get('id', 'b')} do not compare: {what}. Measure both alike"
        )


def under(protocol: Mapping[str, Any]) -> str:
    """What a logged score's name ends in: n30000/cfg3, with what else was swept or is not an average's, or float32."""
    sampling, dtype = protocol.get("sampling"), protocol.get("dtype", "float32")
    precision = "" if dtype == "float32" else f"/{dtype}"
    if sampling is None:
        return f"n{protocol['n']}/{protocol['made']}{precision}"
    ema = "" if protocol["weights"] == "ema" else f"/{protocol['weights']}"
    return f"n{protocol['n']}/cfg{sampling['guidance'].get('scale', 1):g}/steps{sampling['steps']}{ema}{precision}"

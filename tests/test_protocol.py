import json
import re
from copy import deepcopy
from typing import Any

import pytest

from ldm.errors import UserError
from ldm.evaluation.protocol import differences, digest, protocol_id, refuse_incomparable, under, versions


def test_digest_sees_content_order_and_boundaries():
    base = digest([b"ab", b"c"])
    assert re.fullmatch(r"[0-9a-f]{16}", base)
    assert base == digest(iter([b"ab", b"c"]))
    assert len({base, digest([b"a", b"bc"]), digest([b"c", b"ab"]), digest([b"abc"]), digest([])}) == 5


def test_protocol_id_names_the_content_not_the_order_of_keys():
    protocol = {"n": 12, "sampling": {"steps": 20, "guidance": {"scale": 4.0}}, "seed": 0}
    name = protocol_id(protocol)
    assert re.fullmatch(r"[0-9a-f]{8}", name)
    assert name == protocol_id(dict(reversed(protocol.items())))
    assert name == protocol_id(json.loads(json.dumps(protocol)))
    assert name != protocol_id({**protocol, "seed": 1})
    assert name != protocol_id({**protocol, "sampling": {"steps": 20, "guidance": {"scale": 5.0}}})


def test_ids_are_the_same_in_every_process():
    assert protocol_id({"n": 1}) == "e5d5f7c1"


PROTOCOL: dict[str, Any] = {
    "id": "aaaa", "n": 30000, "side": 512, "resize": "r", "captions": "c", "reference": "f", "seed": 0, "weights": "ema",
    "sampling": {"steps": 50, "guidance": {"scale": 3.0}}, "versions": {"torch": "2"},
    "features": {"inception": {"digest": "d", "side": 299, "resize": "bilinear"}},
}  # fmt: skip


def changed(key: str, value: Any) -> dict[str, Any]:
    out = deepcopy(PROTOCOL)
    *path, last = key.split(".")
    node = out
    for part in path:
        node = node[part]
    node[last] = value
    return out | {"id": "bbbb"}


def test_differences_are_named_to_the_leaf_and_ids_left_out():
    assert differences(PROTOCOL, deepcopy(PROTOCOL) | {"id": "x"}) == {}
    assert differences(PROTOCOL, changed("sampling.guidance.scale", 8.0)) == {"sampling.guidance.scale": (3.0, 8.0)}
    lacking = {key: value for key, value in PROTOCOL.items() if key != "sampling"}
    assert differences(PROTOCOL, lacking) == {"sampling.steps": (50, None), "sampling.guidance.scale": (3.0, None)}
    assert differences(lacking, PROTOCOL)["sampling.steps"] == (None, 50)


@pytest.mark.parametrize(
    ("key", "value"),
    [("n", 10000), ("reference", "g"), ("captions", "d"), ("resize", "squash"), ("side", 256),
     ("features.inception.digest", "e"), ("features.inception.resize", "clean")],
)  # fmt: skip
def test_scores_that_do_not_compare_are_refused_in_words(key: str, value: Any):
    message = f"scores under protocols aaaa and bbbb do not compare: {key} is .* and {value}. Measure both alike"
    with pytest.raises(UserError, match=message):
        refuse_incomparable(PROTOCOL, changed(key, value))


@pytest.mark.parametrize("key", ["sampling.steps", "seed", "weights", "versions.torch"])
def test_only_the_way_of_making_may_differ(key: str):
    refuse_incomparable(PROTOCOL, changed(key, 7))
    refuse_incomparable(PROTOCOL, {**PROTOCOL, "features": {"clip": {"digest": "z"}}})  # no score is of both networks


def test_a_logged_name_says_n_guidance_steps_and_the_average():
    assert under(PROTOCOL) == "n30000/cfg3/steps50"
    assert under(changed("weights", "average 0.05, step 9")) == "n30000/cfg3/steps50/average 0.05, step 9"
    assert under({"n": 12, "made": "reconstruction"}) == "n12/reconstruction"


def test_versions_are_plain():
    assert {"torch", "ldm"} <= versions().keys()
    assert all(re.fullmatch(r"[\w.]+", value) for value in versions().values())

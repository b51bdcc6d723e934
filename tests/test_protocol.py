import json
import re

from ldm.evaluation.protocol import digest, protocol_id


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

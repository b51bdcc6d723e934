"""Files whole or not at all, their digests, and logs cut where a run goes on."""

from pathlib import Path

import pytest

from ldm.files import aside, cut_after, sha256


def test_what_was_logged_past_the_step_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    cut_after(path, 5)
    assert not path.exists()
    path.write_text('{"step": 4, "a": 1}\n{"step": 5}\n{"step": 6}\nnot json\n{"a": 1}\n{"step": 7, "a"')
    cut_after(path, 5)
    assert path.read_text() == '{"step": 4, "a": 1}\n{"step": 5}\n'


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def interrupted() -> None:
        with aside(path) as partial:
            partial.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert path.read_text() == "old"
    with aside(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert not partial.exists()


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

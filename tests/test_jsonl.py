from pathlib import Path

from ldm.jsonl import cut_after


def test_what_was_logged_past_the_step_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    cut_after(path, 5)
    assert not path.exists()
    path.write_text('{"step": 4, "a": 1}\n{"step": 5}\n{"step": 6}\nnot json\n{"a": 1}\n{"step": 7, "a"')
    cut_after(path, 5)
    assert path.read_text() == '{"step": 4, "a": 1}\n{"step": 5}\n'

"""Files appear whole, or not at all."""

import pytest

from modeling.files import write_whole


def test_files_replace_those_of_the_same_name_and_leave_others(tmp_path):
    (tmp_path / "kept").write_text("old")
    (tmp_path / "replaced").write_text("old")
    with write_whole(tmp_path) as scratch:
        (scratch / "replaced").write_text("new")
        (scratch / "added").write_text("new")
        assert (tmp_path / "replaced").read_text() == "old"

    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "kept": "old",
        "replaced": "new",
        "added": "new",
    }


def test_an_error_leaves_the_folder_as_it_was(tmp_path):
    (tmp_path / "replaced").write_text("old")

    def fail_half_way() -> None:
        with write_whole(tmp_path) as scratch:
            (scratch / "replaced").write_text("new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("replaced", "old")]


def test_a_folder_that_does_not_exist_is_made(tmp_path):
    with write_whole(tmp_path / "a" / "b") as scratch:
        (scratch / "file").write_bytes(b"\0" * 10)
    assert (tmp_path / "a" / "b" / "file").stat().st_size == 10


def test_files_can_be_read_by_those_who_may_read_the_folder(tmp_path):
    (tmp_path / "plain").write_text("")
    with write_whole(tmp_path) as scratch:
        (scratch / "file").write_text("")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode

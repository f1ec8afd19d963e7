"""Files appear whole, or not at all."""

import pytest

from modeling.files import PENDING_FOLDER, find_whole, write_whole


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


def test_a_killed_process_leaves_no_mix_and_the_next_one_moves_on(tmp_path):
    (tmp_path / "config").write_text("old")
    (tmp_path / "weights").write_text("old")
    pending = tmp_path / PENDING_FOLDER
    pending.mkdir()
    (pending / "weights").write_text("new")  # killed after `config` was moved
    (tmp_path / "config").write_text("new")

    assert [find_whole(tmp_path, name).read_text() for name in ("config", "weights")] == ["new", "new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config", "weights"]


def test_what_a_killed_process_left_to_move_comes_before_what_is_written_next(tmp_path):
    pending = tmp_path / PENDING_FOLDER
    pending.mkdir()
    (pending / "weights").write_text("first")
    (pending / "card").write_text("first")
    with write_whole(tmp_path) as scratch:
        (scratch / "weights").write_text("second")

    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"weights": "second", "card": "first"}


def test_files_that_cannot_be_moved_are_read_where_they_are(tmp_path, monkeypatch):
    pending = tmp_path / PENDING_FOLDER
    pending.mkdir()
    (pending / "weights").write_text("new")
    (tmp_path / "weights").write_text("old")

    def refuse(*_args) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("os.replace", refuse)
    assert find_whole(tmp_path, "weights").read_text() == "new"
    assert find_whole(tmp_path, "absent") == tmp_path / "absent"

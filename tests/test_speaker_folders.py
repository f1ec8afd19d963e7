"""Any id of a speaker has a folder; no two share one."""

import pytest

from modeling.adapters import check_adapter_name
from training.speaker_folders import name_folders

ODD = [
    "a" * 128, "\u0928\u0940\u0924\u093e", "Jose\u0301", "Anna Maria", "anna_maria", "F01.", "me@home", "CON", "com1.",
    "../x", "..", ".", "", "/etc", "a\\b", "a\nb", "keys", "__base__", "-x", "\ud800", "x" * 65,
]  # fmt: skip


def test_ids_that_may_name_a_folder_are_its_name():
    plain = ["ann", "F01", "theo-2", "Jos\u00e9", "\uc548\ub098"]
    assert name_folders(plain) == {speaker_id: speaker_id for speaker_id in plain}


@pytest.mark.parametrize("speaker_id", ODD)
def test_every_other_id_gets_a_name_that_an_adapter_may_have(speaker_id):
    (name,) = name_folders([speaker_id]).values()
    assert check_adapter_name(name) == name
    assert name != speaker_id or speaker_id == "anna_maria"


def test_no_two_ids_share_a_folder_even_where_case_does_not_count():
    ids = [*ODD, "F01", "f01", "Jos\u00e9", name_folders(["Anna Maria"])["Anna Maria"]]
    names = name_folders(ids)
    assert len({name.casefold() for name in names.values()}) == len(set(ids))
    assert names["f01"] == "f01"


def test_a_derived_name_does_not_depend_on_the_others():
    assert name_folders(["Anna Maria"])["Anna Maria"] == name_folders(ODD)["Anna Maria"]

"""An adapter on the Hub that cannot be read says why: the name, access, the network or the cache."""

import pytest
from huggingface_hub import HfApi
from minihub import MiniHub
from test_hub import connect, download_from

from modeling.adapter_loading import read_adapter


@pytest.fixture
def hub(tmp_path, tiny_adapters):
    """A Hub with a public, a gated and a private copy of an adapter, and this process as its client."""
    with MiniHub() as hub, pytest.MonkeyPatch.context() as patch:
        connect(patch, hub)
        download_from(patch, hub, tmp_path / "cache")
        for name in ("open", "gated", "private"):
            HfApi().create_repo(f"me/{name}", private=name == "private")
            HfApi().upload_folder(repo_id=f"me/{name}", folder_path=tiny_adapters["alice"])
        hub.gated.add("me/gated")
        yield hub, patch


@pytest.mark.usefixtures("hub")
def test_a_public_adapter_and_a_private_one_are_read_with_a_token():
    for name in ("me/open", "me/private"):
        assert read_adapter(name).config.kind == "mlp"


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("me/none", "Correct the name; if it is private, log in"),
        ("me/private", "Correct the name; if it is private, log in"),
        ("me/gated", "Ask for access on its page on the Hub, and log in"),
    ],
)
def test_an_adapter_without_access_says_what_to_ask_for(name, advice):
    with pytest.raises(ValueError, match=f"must be an adapter of this base, got {name}, .*{advice}"):
        read_adapter(name, token=False)


@pytest.mark.usefixtures("hub")
def test_a_token_that_the_hub_refuses_is_named():
    with pytest.raises(ValueError, match="The Hub refused the token; log in again"):
        read_adapter("me/open", token="hf_wrong")


def test_an_adapter_that_is_not_in_the_cache_says_so(hub):
    _, patch = hub
    read_adapter("me/open")
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert read_adapter("me/open").config.kind == "mlp"
    with pytest.raises(ValueError, match="not in the cache and HF_HUB_OFFLINE is set: go online once, or correct"):
        read_adapter("me/private")


def test_a_hub_that_cannot_be_reached_is_named(tmp_path):
    with MiniHub() as hub:
        pass  # its port is closed again
    with pytest.MonkeyPatch.context() as patch:
        connect(patch, hub)
        download_from(patch, hub, tmp_path / "cache")
        patch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # it tries for 23 s
        with pytest.raises(ValueError, match="not in the cache and the Hub cannot be reached: go online, or correct"):
            read_adapter("me/open")

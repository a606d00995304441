"""The real huggingface_hub against a hub on localhost, and two small checkpoints."""

import fake_hub
import huggingface_hub
import pytest
from checkpoints import fields, tensors, write
from hub_cache import bars_of_environment, to
from huggingface_hub import constants


@pytest.fixture(scope="module")
def served():
    with fake_hub.serve() as hub:
        yield hub


@pytest.fixture
def hub(served, monkeypatch, tmp_path):
    """The hub that huggingface_hub talks to, with nothing in it, and an empty cache in `tmp_path`."""
    for kept in (served.repos, served.revisions, served.refusals, served.requests, served.sent):
        kept.clear()
    served.ranges = True
    to(monkeypatch, served.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    bars_of_environment(monkeypatch, None)
    monkeypatch.chdir(tmp_path)
    yield served
    huggingface_hub.close_session()


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "small", fields(), tensors(fields()))


@pytest.fixture
def sharded(tmp_path):
    return write(tmp_path / "sharded", fields(), tensors(fields()), shards=2)

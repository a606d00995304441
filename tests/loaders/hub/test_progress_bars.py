"""`local_folder`: when progress bars are shown, and that nothing else is written to stderr."""

import sys

import huggingface_hub
import pytest
from hub_cache import REPO, bars_of_environment, refusal
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from perparam.loaders.hub import local_folder


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [(None, False, False), (None, True, True), (False, True, False), (True, False, True)],
)
def test_progress_bars_are_shown_where_asked_or_in_a_terminal(hub, small, monkeypatch, progress, terminal, shown):
    hub.add(REPO, small)
    states = []

    def watched(*_, **__):
        states.append(not are_progress_bars_disabled())
        raise RuntimeError("enough")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", watched)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert "RuntimeError: enough" in refusal(REPO, progress=progress)
    assert states == [shown]
    assert not are_progress_bars_disabled()


def test_progress_bars_that_were_off_stay_off(hub, small):
    hub.add(REPO, small)
    disable_progress_bars()
    try:
        local_folder(REPO, progress=False)
        assert are_progress_bars_disabled()
    finally:
        enable_progress_bars()


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("progress", [False, True])
def test_the_environment_decides_about_progress_bars_without_a_warning(hub, monkeypatch, disabled, progress):
    bars_of_environment(monkeypatch, disabled)
    refusal("owner/absent", progress=progress)
    assert are_progress_bars_disabled() == disabled


def test_nothing_is_written_to_stderr_that_is_no_terminal(hub, small, capfd):
    hub.add(REPO, small)
    local_folder(REPO)
    assert capfd.readouterr() == ("", "")

import pytest

from twins_fast.train import trainer


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Runs draw no pictures, which take a second each, but for the tests that are marked ``draws``."""
    if "draws" not in request.keywords:
        monkeypatch.setattr(trainer, "draw_curves", lambda runs, target, title: None)

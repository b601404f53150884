"""Autotuning with a clock of our own: no card, no kernel."""

from dataclasses import dataclass

import pytest

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from fakd_kernels import _tuning


@dataclass(frozen=True)
class Tile:
    size: int


TILES = Tile(8), Tile(4), Tile(2)


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_tuning.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_tuning.torch.cuda, "get_device_name", lambda: "a card")
    _tuning.winners.cache_clear()
    yield
    _tuning.winners.cache_clear()


def call():
    """Two kernels; returns what they were launched with."""
    return _tuning.pick("one", TILES), _tuning.pick("two", TILES)


def clock(run):
    """The first kernel is fastest with the smallest tile, the second with the middle one."""
    one, two = run()
    return one.size + 10 * abs(two.size - 4)


def test_the_first_candidate_serves_until_measured():
    assert call() == (Tile(8), Tile(8))
    assert not _tuning.cache_path().exists()


def test_winners_are_kept_and_measured_once():
    assert _tuning.tune(call, clock) == {"one": "Tile(size=2)", "two": "Tile(size=4)"}
    assert call() == (Tile(2), Tile(4))
    _tuning.winners.cache_clear()  # as another process
    assert call() == (Tile(2), Tile(4))
    assert _tuning.tune(call, lambda run: pytest.fail("measured again")) == {}


def test_what_does_not_fit_is_left_out():
    def narrow(run):
        tiles = run()
        if tiles[0].size < 8:
            raise OutOfResources(2, 1, "shared memory")
        return clock(run)

    assert _tuning.tune(call, narrow)["one"] == "Tile(size=8)"


def test_a_card_or_kernels_or_triton_of_another_kind_has_its_own(monkeypatch):
    _tuning.tune(call, clock)
    first = _tuning.cache_path()
    monkeypatch.setattr(_tuning.torch.cuda, "get_device_name", lambda: "another")
    _tuning.winners.cache_clear()
    assert _tuning.cache_path() != first
    assert call() == (Tile(8), Tile(8))
    monkeypatch.setattr(_tuning, "_kernel_version", lambda: "changed")
    assert len({first, _tuning.cache_path()}) == 2


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_broken_file_is_named_and_ignored(text):
    path = _tuning.cache_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match="must hold tuned tiles"):
        assert call() == (Tile(8), Tile(8))
    assert _tuning.tune(call, clock)["one"] == "Tile(size=2)"
    assert sorted(path.parent.iterdir()) == [path]


def test_a_winner_that_is_no_candidate_any_more_is_ignored():
    _tuning.tune(call, clock)
    assert _tuning.pick("one", (Tile(16), Tile(32))) == Tile(16)


def test_without_a_card_nothing_is_read(monkeypatch):
    _tuning.tune(call, clock)
    monkeypatch.setattr(_tuning.torch.cuda, "is_available", lambda: False)
    _tuning.winners.cache_clear()
    assert call() == (Tile(8), Tile(8))

"""Every tile that a kernel may be tuned to computes the same, in Triton's interpreter on a CPU."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs TRITON_INTERPRET=1 in the environment of the process", allow_module_level=True
    )
pytest.importorskip("triton")

from fakd_kernels.ops.attention_kl.triton_kernel import tiles as attention_tiles
from tests.support import attention_cases, attention_checks

# As in the other tests of these kernels: what is masked may overflow before it is left out.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")

PLACES = (1, 2)  # of the candidates after the first, which every other test meets


def pick_place(monkeypatch, tiles, place: int) -> list:
    """Let the last candidate up to a place serve; what was picked is listed."""
    picked = []

    def pick(kernel, candidates):
        picked.append(candidates[min(place, len(candidates) - 1)])
        return picked[-1]

    monkeypatch.setattr(tiles, "pick", pick)
    return picked


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["alternating", "mean-spread"])
def test_attention_kl(name, place, monkeypatch):
    picked = pick_place(monkeypatch, attention_tiles, place)
    inputs = attention_cases.make_inputs(attention_cases.CASES_BY_ID[name])
    attention_checks.check(inputs, "triton")
    assert picked
    assert attention_tiles._INTERPRETED_TILE not in picked

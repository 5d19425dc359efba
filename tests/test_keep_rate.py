"""The keep-rate schedule against the values of the published code."""

import json
from pathlib import Path

import pytest

from util.keep_rate import keep_rate_at

GOLDEN = json.loads((Path(__file__).parent / "golden" / "deit_helpers.json").read_text())["keep_rate"]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: str(case["args"][0]))
def test_the_keep_rate_is_the_published_one(case):
    iteration, _, start, end, per_epoch, base, largest = case["args"]
    assert keep_rate_at(iteration, start, end, per_epoch, base, largest) == pytest.approx(case["value"], abs=1e-12)


def test_the_keep_rate_falls_from_1_to_the_base_rate_and_stays():
    rates = [keep_rate_at(i, 1, 3, 10, 0.5) for i in range(50)]
    assert rates[:11] == [1.0] * 11 and rates[30:] == [0.5] * 20
    assert all(a > b for a, b in zip(rates[10:30], rates[11:31], strict=True))
    assert rates[20] == pytest.approx(0.75)


def test_without_a_shrinking_phase_the_base_rate_holds_from_its_start():
    assert [keep_rate_at(i, 1, 1, 2, 0.7) for i in range(4)] == [1.0, 1.0, 0.7, 0.7]

"""Calibration against numbers computed by hand, and on models whose calibration is known."""
import numpy as np
import pytest

from finetune_accel.core.calibration import calibration


def test_calibration_equals_what_is_computed_by_hand():
    p, right = [0.95, 0.95, 0.7, 0.6, 0.55, 0.5], [1, 1, 0, 1, 1, 0]
    found = calibration(p, right, bins=3)
    by_hand = (2 * abs(0.5 - 0.525) + 2 * abs(0.5 - 0.65) + 2 * abs(1 - 0.95)) / 6
    assert np.isclose(found["ece"], by_hand) and [row["n"] for row in found["bins"]] == [2, 2, 2]
    assert np.isclose(found["brier"], (2 * 0.05**2 + 0.7**2 + 0.4**2 + 0.45**2 + 0.5**2) / 6)
    assert calibration([1.0, 0.0], [1, 0])["ece"] == 0 == calibration([1.0, 0.0], [1, 0])["brier"]
    assert calibration([1.0], [0])["ece"] == 1 and len(calibration(np.linspace(0, 1, 300), np.ones(300))["bins"]) == 15
    for wrong in [([], []), ([1.1], [1]), ([0.5], [1, 0]), ([float("nan")], [1])]:
        with pytest.raises(ValueError):
            calibration(*wrong)


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_a_large_one():
    random = np.random.default_rng(0)
    p = random.uniform(0.3, 1, 20_000)
    assert calibration(p, random.random(20_000) < p)["ece"] < 0.015
    assert abs(calibration(p, random.random(20_000) < p - 0.2)["ece"] - 0.2) < 0.015

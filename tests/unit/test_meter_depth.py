"""Depth meter: an independent float64 reference, the named protocols, and values by hand."""

import json

import numpy as np
import pytest
import torch

from visionmtl.metrics.depth import DepthMeter
from visionmtl.structures import Sample

PIXEL = np.zeros((1, 1, 3), np.uint8)


def metered(*pairs, **settings):
    meter = DepthMeter(**settings)
    for number, (predicted, true) in enumerate(pairs):
        truth = None if true is None else np.asarray(true, np.float32)
        meter.update(np.asarray(predicted, np.float32), Sample(image=PIXEL, image_id=str(number), depth_m=truth))
    return meter.compute()


def reference(predicted, true, low=1e-3, high=10.0):
    """The usual formulas, pixel by pixel lists, float64."""
    p, g = predicted.astype(np.float64), true.astype(np.float64)
    keep = np.logical_and(g > low, g < high)
    p, g = np.minimum(np.maximum(p[keep], low), high), g[keep]
    e = np.log(p) - np.log(g)
    thresh = np.maximum(g / p, p / g)
    return {
        "abs_rel": np.mean(np.abs(g - p) / g),
        "sq_rel": np.mean((g - p) ** 2 / g),
        "mae_m": np.mean(np.abs(g - p)),
        "rmse_m": np.sqrt(np.mean((g - p) ** 2)),
        "rmse_log": np.sqrt(np.mean(e**2)),
        "log10": np.mean(np.abs(np.log10(g) - np.log10(p))),
        "silog": 100 * np.sqrt(max(np.mean(e**2) - np.mean(e) ** 2, 0.0)),
        "delta1": np.mean(thresh < 1.25),
        "delta2": np.mean(thresh < 1.25**2),
        "delta3": np.mean(thresh < 1.25**3),
    }


def rooms(count, shape, seed=0):
    rng = np.random.default_rng(seed)
    true = rng.uniform(0, 12, (count, *shape)).astype(np.float32)  # some beyond 10 m, some missing
    true[rng.random(true.shape) < 0.3] = 0
    guess = (rng.uniform(0, 12, true.shape) + true).astype(np.float32) * rng.choice([0.5, 1, -0.1], true.shape)
    return guess.astype(np.float32), true


ADVERSARIAL = {
    "predictions without bounds": ([[np.inf, -np.inf, 0, -3, 1e30, 1e-30]], [[1, 2, 3, 4, 5, 6]]),
    "truth that means nothing": ([[1, np.nan, np.nan, np.nan, np.inf, 2]], [[1, np.nan, 0, -1, np.inf, 10]]),
    "one pixel": ([[3.0]], [[2.0]]),
    "at the ends of the range": ([[10, 1e-3, 10, 1e-3]], [[0.0010001, 9.999999, 9.999999, 0.0010001]]),
    "at the thresholds": ([[1.25, 1.5625, 1.953125, 0.8, 0.64, 0.512]], [[1] * 6]),
    "all off by one factor": (np.full((40, 50), 3.3), np.full((40, 50), 3.0)),
    "exact": (np.linspace(1, 9, 77)[None], np.linspace(1, 9, 77)[None]),
}


@pytest.mark.parametrize("protocol", ["per_image", "pooled"])
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_adversarial_cases_agree_with_the_reference_to_1e_6(case, protocol):
    guess, true = (np.array(values, np.float32) for values in ADVERSARIAL[case])

    result, expected = metered((guess, true), protocol=protocol), reference(guess, true)

    expected["silog"] = 0.0 if case in ("all off by one factor", "exact", "one pixel") else expected["silog"]
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-6)


def close(result, expected):
    return {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-9)


def test_eigen_is_the_mean_over_images_of_the_cropped_metric():
    guess, true = rooms(2, (480, 640))

    result = metered(*zip(guess, true, strict=True), protocol="nyu_eigen")

    each = [reference(p[45:471, 41:601], g[45:471, 41:601]) for p, g in zip(guess, true, strict=True)]
    assert close(result, {name: np.mean([one[name] for one in each]) for name in each[0]})
    assert result["protocol"].startswith("nyu_eigen: 0.001 < truth < 10 m")
    assert result["images_measured"] == 2


def test_per_image_is_eigen_without_the_crop():
    guess, true = rooms(3, (20, 30))

    result = metered(*zip(guess, true, strict=True), protocol="per_image")

    each = [reference(p, g) for p, g in zip(guess, true, strict=True)]
    assert close(result, {name: np.mean([one[name] for one in each]) for name in each[0]})


def test_pooled_is_the_metric_over_all_pixels():
    guess, true = rooms(3, (20, 30))
    true[0, :15] = 0  # images weigh differently

    result = metered(*zip(guess, true, strict=True), protocol="pooled")

    assert close(result, reference(guess, true))
    assert result["pixels"] == np.sum((true > 1e-3) & (true < 10))


def test_batch_mean_is_the_mean_over_groups():
    guess, true = rooms(5, (20, 30))

    result = metered(*zip(guess, true, strict=True), protocol="batch_mean", group_images=2)

    each = [reference(guess[rows], true[rows]) for rows in (slice(0, 2), slice(2, 4), slice(4, 5))]
    assert close(result, {name: np.mean([one[name] for one in each]) for name in each[0]})


def test_values_by_hand():
    result = metered(([[2.0, 1.0, 9.0]], [[1.0, 1.0, 0.0]]))

    assert result["abs_rel"] == 0.5
    assert result["rmse_m"] == pytest.approx(0.5**0.5)
    assert result["pixels"] == 2
    assert result["delta3"] == 0.5
    assert result["silog"] == pytest.approx(100 * np.log(2) / 2)


def test_deltas_are_strict():
    assert metered(([[1.25]], [[1.0]]))["delta1"] == 0  # both exact in binary
    assert metered(([[1.2499]], [[1.0]]))["delta1"] == 1


def test_predictions_are_clamped_and_the_limits_themselves_are_not_valid():
    result = metered(([[99.0, 5.0]], [[8.0, 10.0]]), max_m=10.0)

    assert result["pixels"] == 1
    assert result["rmse_m"] == 2


def test_silog_of_a_constant_factor_is_zero_to_many_digits():
    true = np.linspace(1, 5, 1000, dtype=np.float32).reshape(20, 50)

    assert metered((true * np.float32(2), true), protocol="pooled")["silog"] < 1e-5  # of 100


@pytest.mark.parametrize("pairs", [[], [([[1.0]], [[0.0]])], [([[1.0]], [[np.nan]])], [([[1.0]], None)]])
def test_without_valid_pixels_every_score_is_none(pairs):
    result = metered(*pairs)

    assert result["rmse_m"] is None
    assert result["delta1"] is None
    assert result["pixels"] == 0
    json.dumps(result, allow_nan=False)


def test_an_image_without_valid_pixels_does_not_enter_the_mean():
    assert metered(([[2.0]], [[1.0]]), ([[2.0]], [[0.0]]))["abs_rel"] == 1


def test_median_alignment_removes_the_scale_and_says_so():
    true = np.linspace(1, 5, 101, dtype=np.float32)[None]

    result = metered((true * 7, true), align="median")

    assert result["rmse_m"] < 1e-5
    assert result["protocol"].startswith("per_image, median-aligned: ")


@pytest.mark.parametrize(
    ("predicted", "true", "settings", "message"),
    [
        (np.ones((2, 2)), np.ones((2, 3)), {}, r"the prediction is \[2, 2\] and the truth \[2, 3\]"),
        (
            np.ones((2, 2)),
            np.ones((2, 2)),
            {"protocol": "nyu_eigen"},
            "2x2 px; protocol 'nyu_eigen'.*leave --protocol out and set tasks.NAME.protocol=per_image",
        ),
        (np.full((2, 2), np.nan), np.ones((2, 2)), {}, "4 predicted depths are NaN"),
        (np.zeros((2, 2)), np.ones((2, 2)), {"align": "median"}, "needs a positive finite one"),
        (
            np.ones((2, 2)),
            np.ones((2, 2)),
            {"protocol": "egien"},
            "unknown depth protocol 'egien'; allowed are nyu_eigen",
        ),
        (np.ones((2, 2)), np.ones((2, 2)), {"min_m": 0.0}, "allowed is 0 < min_m < max_m"),
    ],
)
def test_errors_teach(predicted, true, settings, message):
    with pytest.raises(ValueError, match=message):
        metered((predicted, true), **settings)


def test_what_one_factor_an_image_costs():
    """Two images, one seen at half, one at twice its distance: ln factors +ln 2 and -ln 2, no bias on average."""
    halved, doubled = ([[0.5, 1, 2, 2]], [[1, 2, 4, 8]]), ([[2, 4, 8, 9]], [[1, 2, 4, 4.5]])

    result = metered(halved, doubled)

    # the medians are (2 + 4) / 2 = 3 against 1.5, and 3 against 6; 8 m become 4 m and stay wrong
    assert result["scale_spread"] == pytest.approx(np.log(2))
    assert result["aligned_delta1"] == (3 / 4 + 1) / 2 and result["delta1"] == 0
    assert result["log_bias"] == pytest.approx((-(3 * np.log(2) + np.log(4)) / 4 + np.log(2)) / 2)


def test_nyu_median_pools_the_pixels_of_aligned_predictions():
    guess, true = rooms(2, (480, 640))
    true[1] *= 3  # so that the mean over images would be another number
    guess = np.abs(guess) + 0.1

    def aligned(one, truth):
        valid = (truth > 1e-3) & (truth < 10)
        return one * (np.median(truth[valid]) / np.median(one[valid].astype(np.float64)))

    pairs = list(zip(guess, true, strict=True))
    result = metered(*pairs, protocol="nyu_median")
    by_hand = [(np.clip(aligned(*pair), 1e-3, 10), pair[1]) for pair in pairs]
    valid = [(truth > 1e-3) & (truth < 10) for _, truth in by_hand]
    one, truth = (np.concatenate([pair[i][where] for pair, where in zip(by_hand, valid, strict=True)]) for i in (0, 1))

    assert result["rmse_m"] == pytest.approx(np.sqrt(((one.astype(np.float64) - truth) ** 2).mean()), rel=1e-5)
    assert result["abs_rel"] == pytest.approx((np.abs(one.astype(np.float64) - truth) / truth).mean(), rel=1e-5)
    assert result["rmse_m"] != pytest.approx(metered(*by_hand, protocol="per_image")["rmse_m"], rel=1e-3)
    assert result["delta1"] == result["aligned_delta1"] and result["protocol"].startswith("nyu_median: 0.001 < truth")


@pytest.mark.parametrize("align", ["none", "median"])
def test_sums_that_wait_for_no_device_are_those_over_the_valid_pixels_alone(align):
    meter = DepthMeter(align=align)
    for guess, true in zip(*rooms(4, (9, 11)), strict=True):
        guess = np.abs(guess) + 0.1  # the median of an aligned prediction must be positive
        sums = [
            meter._sums(torch.tensor(guess).double(), torch.tensor(true).double(), on_cpu) for on_cpu in (True, False)
        ]
        torch.testing.assert_close(*sums, rtol=1e-12, atol=1e-12)
    nothing = torch.zeros(3, 4, dtype=torch.float64)
    torch.testing.assert_close(*(meter._sums(nothing + 1, nothing, on_cpu) for on_cpu in (True, False)), equal_nan=True)

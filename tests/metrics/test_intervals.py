from itertools import product
from math import isnan, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medseg.errors import ConfigError
from medseg.metrics import Interval, bootstrap_interval, paired_bootstrap_difference


def exact_resamples(values: np.ndarray, groups: np.ndarray, statistic) -> np.ndarray:
    """Every resample of the patients that there can be, each once."""
    parts = [values[groups == name] for name in np.unique(groups)]
    return np.array([statistic(np.concatenate(draw)) for draw in product(parts, repeat=len(parts))])


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_against_all_resamples_of_four_patients(statistic):
    values = np.array([0.9, 0.85, 0.1, 0.5, 0.55, 0.6, 0.7])
    groups = np.array(["a", "a", "b", "c", "c", "c", "d"])
    every = exact_resamples(values, groups, statistic)
    interval = bootstrap_interval(values, groups, statistic, level=0.8, resamples=4000)
    assert interval.estimate == statistic(values)
    low, high = np.quantile(every, [0.1, 0.9])
    assert interval.low == pytest.approx(low, abs=0.02)
    assert interval.high == pytest.approx(high, abs=0.02)


def test_without_groups_it_is_the_plain_bootstrap_of_scipy():
    values = np.random.default_rng(1).beta(5, 2, 40)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=0).confidence_interval
    interval = bootstrap_interval(values)
    assert interval.low == pytest.approx(expected.low, abs=0.005)
    assert interval.high == pytest.approx(expected.high, abs=0.005)


def test_slices_of_one_patient_add_no_certainty():
    rng = np.random.default_rng(0)
    dice = rng.uniform(0.3, 0.9, 12)
    per_patient = bootstrap_interval(dice)
    slices, patients = np.repeat(dice, 50), np.repeat(np.arange(12), 50)
    grouped = bootstrap_interval(slices, patients)
    naive = bootstrap_interval(slices)
    assert grouped.high - grouped.low == pytest.approx(per_patient.high - per_patient.low, rel=1e-6)
    assert naive.high - naive.low < 0.3 * (grouped.high - grouped.low)


def test_it_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        patients = rng.normal(0.7, 0.1, 30)
        slices = np.repeat(patients, 5) + rng.normal(0, 0.05, 150)
        interval = bootstrap_interval(slices, np.repeat(np.arange(30), 5), resamples=500, seed=trial)
        hits += interval.low <= 0.7 <= interval.high
    assert 0.87 <= hits / 200 <= 0.99


@given(st.permutations(range(8)), st.sampled_from([np.mean, np.median]))
@settings(max_examples=20, deadline=None)
def test_the_order_of_rows_does_not_matter(order, statistic):
    values = np.array([0.1, 0.2, 0.4, 0.3, 0.9, 0.8, 0.75, 0.5])
    patients = np.array(list("aabbccde"))
    order = np.array(order)
    one = bootstrap_interval(values, patients, statistic, resamples=100)
    other = bootstrap_interval(values[order], patients[order], statistic, resamples=100)
    np.testing.assert_allclose([one.estimate, one.low, one.high], [other.estimate, other.low, other.high])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
@settings(max_examples=30, deadline=None)
def test_bounds_lie_within_the_values(values):
    interval = bootstrap_interval(values, resamples=100)
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9


def test_the_seed_decides():
    values = np.random.default_rng(0).uniform(size=10)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_a_higher_level_is_wider():
    values = np.random.default_rng(0).uniform(size=20)
    wide, narrow = bootstrap_interval(values, level=0.99), bootstrap_interval(values, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert wide.level == 0.99


def test_undefined_scores_are_left_out():
    assert bootstrap_interval([0.1, nan, 0.5, 0.9], list("abca")) == bootstrap_interval([0.1, 0.5, 0.9], list("aca"))


def test_too_few_patients_have_no_bounds():
    one = bootstrap_interval([0.5, 0.7], ["a", "a"])
    assert one.estimate == pytest.approx(0.6)
    assert isnan(one.low)
    assert isnan(one.high)
    assert str(one) == "0.60 (no interval)"
    assert isnan(bootstrap_interval([]).estimate)
    assert isnan(bootstrap_interval([nan, nan]).estimate)


def test_interval_prints_short():
    assert str(Interval(0.81, 0.76, 0.85)) == "0.81 (0.76 to 0.85)"
    assert str(Interval(-0.05, -0.1, -0.02)) == "-0.05 (-0.10 to -0.02)"


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_pairing_cancels_what_both_models_share(statistic):
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.2, 0.9, 20)
    a, b = hard + 0.05 + rng.normal(0, 0.005, 20), hard
    difference = paired_bootstrap_difference(a, b, statistic=statistic, resamples=1000)
    assert difference.low > 0
    assert difference.estimate == pytest.approx(statistic(a) - statistic(b))
    alone = [bootstrap_interval(x, statistic=statistic, resamples=1000) for x in (a, b)]
    assert alone[0].low < alone[1].high, "the intervals of each alone overlap"


def test_paired_mean_is_the_interval_of_the_differences():
    rng = np.random.default_rng(0)
    a, b, groups = rng.uniform(size=30), rng.uniform(size=30), np.repeat(np.arange(10), 3)
    one = paired_bootstrap_difference(a, b, groups)
    other = bootstrap_interval(a - b, groups)
    assert (one.low, one.high) == pytest.approx((other.low, other.high))
    swapped = paired_bootstrap_difference(b, a, groups)
    assert (swapped.low, swapped.high) == pytest.approx((-one.high, -one.low), abs=1e-9)


def test_pairs_with_an_undefined_score_are_left_out():
    one = paired_bootstrap_difference([0.5, nan, 0.9, 0.4], [0.4, 0.5, 0.7, nan])
    assert one.estimate == pytest.approx(0.15)


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match=r"\[2, 3\] entries"):
        bootstrap_interval([1, 2, 3], ["a", "b"])
    with pytest.raises(ConfigError, match="entries"):
        paired_bootstrap_difference([1, 2], [1, 2, 3])
    with pytest.raises(ConfigError, match=r"level 95"):
        bootstrap_interval([1, 2], level=95)

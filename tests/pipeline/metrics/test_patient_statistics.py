"""Bootstrap by patient against SciPy, and the rules about who counts."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from latentcache import InputError
from pipeline.metrics import by_patient, interval, paired_difference


def cohort(n: int = 40, seed: int = 0) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {f"{i:04x}": float(v) for i, v in enumerate(rng.normal(30, 2, n))}


def test_a_patient_with_two_pairs_counts_once() -> None:
    assert by_patient([("a", 30.0), ("a", 34.0), ("b", 20.0)]) == {"a": 32.0, "b": 20.0}
    assert interval({"a": 32.0, "b": 20.0}).mean == 26.0


def test_the_interval_is_scipys() -> None:
    values = cohort()
    found = interval(values, resamples=20_000)
    # Resampling scatters both ends by about 1% of the interval's width at 20,000 draws.
    expected = bootstrap(
        (np.array(list(values.values())),),
        np.mean,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(9),
    ).confidence_interval
    assert found.low == pytest.approx(expected.low, abs=0.04)
    assert found.high == pytest.approx(expected.high, abs=0.04)


def test_the_interval_depends_on_the_data_alone() -> None:
    values = cohort()
    assert interval(values) == interval(dict(reversed(values.items())))


def test_pairing_removes_what_patients_share() -> None:
    cubic = cohort()
    rng = np.random.default_rng(1)
    model = {k: v + 0.5 + rng.normal(0, 0.1) for k, v in cubic.items()}
    paired = paired_difference(model, cubic)
    assert paired.low is not None
    assert paired.high is not None
    assert 0.4 < paired.low < paired.mean < paired.high < 0.6
    alone = interval(model)
    assert alone.low is not None
    assert alone.high is not None
    assert (paired.high - paired.low) < 0.2 * (alone.high - alone.low)


def test_too_few_patients_have_no_interval_and_infinity_is_refused() -> None:
    assert interval({"a": 30.0, "b": 31.0}).low is None
    with pytest.raises(InputError, match="no patient"):
        interval({})
    with pytest.raises(InputError, match="failure"):
        by_patient([("a", float("inf"))])

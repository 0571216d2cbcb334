"""What a confidence is worth: scikit-learn's numbers, the definitions, and promises that hold."""

import numpy as np
import pytest

from jaxml.tune import r_tuning
from jaxml.tune.r_tuning import Answered, Policy, metrics


def drawn(seed: int, n: int = 200, ties: bool = True):
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(size=n)
    right = rng.uniform(size=n) < 0.2 + 0.6 * confidence
    return (confidence.round(1) if ties else confidence), right


@pytest.mark.parametrize("ties", [False, True])
def test_scikit_learn_has_the_same_numbers(ties):
    theirs = pytest.importorskip("sklearn.metrics")
    calibration = pytest.importorskip("sklearn.calibration")
    for seed in range(5):
        confidence, right = drawn(seed, ties=ties)
        assert metrics.average_precision(confidence, right) == pytest.approx(
            theirs.average_precision_score(right, confidence), abs=1e-12
        )
        assert metrics.auroc(confidence, right) == pytest.approx(theirs.roc_auc_score(right, confidence), abs=1e-12)
        assert metrics.brier(confidence, right) == pytest.approx(theirs.brier_score_loss(right, confidence), abs=1e-12)
        precision, _, thresholds = theirs.precision_recall_curve(right, confidence)
        curve = metrics.risk_coverage(confidence, right)
        np.testing.assert_allclose(curve.threshold, thresholds[::-1])
        np.testing.assert_allclose(1 - curve.risk, precision[:-1][::-1], atol=1e-12)
        if not ties:  # on an edge, scikit-learn puts a value into the bin above
            accuracy, mean = calibration.calibration_curve(right, confidence, n_bins=10)
            ours = metrics.reliability(confidence, right)
            np.testing.assert_allclose(ours.accuracy, accuracy)
            np.testing.assert_allclose(ours.confidence, mean)
            counts = np.histogram(confidence, 10, (0, 1))[0]
            assert metrics.ece(confidence, right) == pytest.approx(counts @ abs(accuracy - mean) / len(right))


def test_the_area_is_the_mean_risk_over_orders_of_ties():
    confidence, right = drawn(3, n=60)
    rng, areas = np.random.default_rng(0), []
    for _ in range(2000):
        order = np.lexsort((rng.uniform(size=60), -confidence))
        areas.append(np.mean(np.cumsum(~right[order]) / np.arange(1, 61)))
    error = np.std(areas) / len(areas) ** 0.5
    assert metrics.risk_coverage(confidence, right).area == pytest.approx(np.mean(areas), abs=4 * error)


def test_accuracy_at_a_coverage_is_the_share_of_the_most_confident():
    confidence, right = drawn(1, ties=False)
    best = right[np.argsort(-confidence)]
    for count in (1, 50, 200):
        assert metrics.at_coverage(confidence, right, count / 200) == pytest.approx(best[:count].mean())
    flat = np.zeros(200)
    assert metrics.at_coverage(flat, right, 0.25) == pytest.approx(right.mean())


def test_honesty_counts_as_the_paper_defines():
    before = np.array([1, 1, 1, 1, 0, 0, 0, 0])
    now = np.array([1, 1, 0, 0, 1, 0, 0, 0])
    willing = np.array([1, 0, 1, 0, 1, 0, 0, 1])
    over, prudent, honest = metrics.honesty(before, now, willing)
    # Of the four that were right, two are refused; of the four wrong, one is right now, and two others are refused.
    assert over == 2 / 4 and prudent == pytest.approx(2 / 3) and honest == pytest.approx((1 - 0.5 + 2 / 3) / 2)


def test_nothing_to_rank_is_nan_and_bad_arrays_are_refused():
    assert np.isnan(metrics.auroc([0.1, 0.2], [1, 1])) and np.isnan(metrics.average_precision([0.1], [0]))
    assert np.isnan(metrics.accuracy([1, 0], [0, 0]))
    for wrong in (([], []), ([0.1], [1, 0]), ([np.nan], [1])):
        with pytest.raises(ValueError, match="metrics: arrays"):
            metrics.brier(*wrong)
    with pytest.raises(ValueError, match="coverage is in"):
        metrics.at_coverage([0.1], [1], 0)
    with pytest.raises(ValueError, match="equal length"):
        metrics.interval(np.mean, np.zeros(3), np.zeros(4))
    assert np.isnan(metrics.interval(np.mean, np.ones(9))).all() and metrics.interval(np.mean, np.ones(10)) == (1, 1)


def test_the_interval_of_a_difference_is_paired():
    rng = np.random.default_rng(0)
    base = rng.normal(size=400)
    low, high = metrics.interval(lambda a, b: float(np.mean(a - b)), base + 0.1, base)
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)


def test_the_promise_on_given_answers_fails_no_more_often_than_it_says():
    """P(wrong | answered) ≤ risk in at least 1 − delta of calibration sets: here the true risk is known."""
    rng, risk, delta = np.random.default_rng(0), 0.2, 0.1
    failed = answered = 0
    for _ in range(400):
        confidence = rng.uniform(size=600)
        right = rng.uniform(size=600) < confidence
        value = r_tuning.threshold(confidence, right, risk, delta=delta)
        if np.isfinite(value):
            answered += 1
            failed += (1 - value) / 2 > risk  # the mean of 1 − c over c in (value, 1)
        elif value == -np.inf:
            failed += 1
    assert answered > 200 and failed / 400 <= delta


def test_the_promise_on_all_questions_holds_on_average():
    rng, risk, wrong = np.random.default_rng(1), 0.1, []
    for _ in range(400):
        confidence = rng.uniform(size=100)
        value = r_tuning.threshold(confidence, rng.uniform(size=100) < confidence, risk, guarantee="marginal")
        wrong.append((1 - np.clip(value, 0, 1)) ** 2 / 2)  # P(answered and wrong)
    assert np.mean(wrong) <= risk + 3 * np.std(wrong) / 20
    assert np.mean(wrong) > risk / 2  # and is not kept by refusing everything


def test_too_few_questions_prove_nothing():
    assert r_tuning.threshold(np.ones(10), np.ones(10), 0.1) == np.inf
    assert r_tuning.threshold(np.linspace(0, 1, 200), np.ones(200), 0.1) == -np.inf
    for wrong in (dict(risk=0.0), dict(risk=0.1, delta=1.0), dict(risk=0.1, guarantee="total")):
        with pytest.raises(ValueError, match=r"policy\.threshold: "):
            r_tuning.threshold(np.ones(4), np.ones(4), **wrong)


def answered(n: int = 200) -> Answered:
    """Certainty tells right from wrong; the answers' probability says nothing."""
    rng = np.random.default_rng(0)
    right = rng.uniform(size=n) < 0.5
    return Answered([""] * n, right, rng.uniform(size=n), np.clip(right * 0.5 + rng.uniform(0, 0.6, n), 0, 1))


def test_calibration_finds_the_confidence_that_tells():
    of = answered()
    policy = r_tuning.calibrate(of)
    assert policy.weight > 0.7
    willing = policy.willing(of)
    assert of.right[willing].mean() > 0.8 and willing[of.right].mean() > 0.8
    assert r_tuning.calibrate(of, coverage=0.3, weight=0.5).willing(of).mean() == pytest.approx(0.3)
    careful = r_tuning.calibrate(of, risk=0.15)
    assert "15%" in careful.promise and of.right[careful.willing(of)].mean() > 0.85
    with pytest.raises(ValueError, match="got both"):
        r_tuning.calibrate(of, risk=0.1, coverage=0.5)


def test_calibration_says_what_it_does_where_nothing_can_be_chosen():
    of = answered(20)
    alike = Answered(of.texts, of.right, np.full(20, 0.5), np.full(20, 0.5))
    policy = r_tuning.calibrate(alike)
    assert policy.willing(alike).all() and "everything is answered" in policy.promise
    right = Answered(of.texts, np.ones(20, bool), of.confidence, of.sure)
    policy = r_tuning.calibrate(right)
    assert (policy.weight, policy.threshold) == (0.5, 0.5) and "all calibration answers are right" in policy.promise
    assert "2.5%" in r_tuning.calibrate(answered(2000), risk=0.025).promise
    tied = r_tuning.calibrate(alike, coverage=0.3, weight=0.5)
    assert tied.promise.startswith("100% of") and tied.willing(alike).all()
    assert r_tuning.calibrate(answered(100), coverage=0.07, weight=0.5).promise.startswith("7% of")
    for wrong in (dict(guarantee="marginal"), dict(delta=0.2), dict(weight=5.0)):
        with pytest.raises(ValueError, match=r"go with risk|weight is in"):
            r_tuning.calibrate(of, **wrong)
    for few, options in ((of.take([]), {}), (of.take([0]), dict(risk=0.1))):
        with pytest.raises(ValueError, match="at least one question"):
            r_tuning.calibrate(few, **options)


def test_the_promise_needs_as_many_questions_as_it_says():
    for risk in (0.05, 0.1, 0.3):
        n = r_tuning.policy.needed(risk)
        assert r_tuning.threshold(np.linspace(0, 1, n), np.ones(n), risk) < np.inf
        assert r_tuning.threshold(np.linspace(0, 1, n - 1), np.ones(n - 1), risk) == np.inf


def test_a_method_that_answers_nothing_is_compared_with_nothing():
    of = answered(20)
    silent, other = (
        r_tuning.Method(n, Policy(0.5, t), {"seen": of, "unanswerable": of}) for n, t in (("a", 2.0), ("b", 0.3))
    )
    found = r_tuning.compare([silent, other])
    assert np.isnan(found["seen"]["b"]["at_equal_coverage"])
    assert found["unanswerable"]["a"]["refusal_rate"] == 1 and np.isnan(
        found["unanswerable"]["b"]["refusal_rate_at_equal_coverage"]
    )


def test_a_policy_is_kept_on_disk(tmp_path):
    for policy in (Policy(0.25, 0.6, "so"), Policy(0.5, np.inf), Policy(0.5, -np.inf)):
        policy.save(tmp_path / "policy.json")
        assert Policy.load(tmp_path / "policy.json") == policy
    for text in ("", "[]", "{}", '{"weight": "x", "threshold": 1, "promise": ""}'):
        (tmp_path / "policy.json").write_text(text)
        with pytest.raises(ValueError, match="a policy has weight"):
            Policy.load(tmp_path / "policy.json")
    with pytest.raises(FileNotFoundError, match="no such file"):
        Policy.load(tmp_path / "none.json")


def test_questions_that_nothing_answers_make_a_report_without_pictures(tmp_path):
    answered = Answered(["2", "5"], np.array([True, False]), np.array([0.9, 0.2]), np.array([0.8, 0.1]))
    methods = [r_tuning.Method("tuned", Policy(), {"unanswerable": answered})]
    r_tuning.report.save(r_tuning.compare(methods), methods, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
    for plot in (r_tuning.report.plot_risk, r_tuning.report.plot_reliability):
        with pytest.raises(ValueError, match=r"a part with right answers is needed .* got unanswerable"):
            plot(methods, tmp_path / "a.png")

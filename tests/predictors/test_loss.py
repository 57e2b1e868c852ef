"""The loss predictor: features by hand, no leakage, and a gain where there is something to learn."""

import numpy as np
import pytest

from methods.policy import DENSE, Decision, Policy
from predictors.features import ChoiceFacts, Features, SiteFacts
from predictors.loss import LossModel, Record, evaluate_unseen, fit_loss

KINDS = ("q+k+v", "o", "gate+up", "down")
BITS = (2, 3, 4, 8)
DECISIONS = tuple(Decision.of("rtn", format=f"w{b}a16-g64") for b in BITS)


def world(seed: int, n: int, *, bend: float = 1.0, noise: float = 0.03) -> tuple[Features, list[Record]]:
    """Policies whose true KL weighs kinds and depths in a way that the score does not know."""
    g = np.random.default_rng(seed)
    factor = np.exp(bend * g.normal(0, 0.5, 4))
    sites, hidden = {}, {}
    for block in range(8):
        for k, kind in enumerate(KINDS):
            level = float(np.exp(g.normal(-6, 1)))
            facts = {
                d: ChoiceFacts(level * 4.0 ** (2 - b), 0.01 * (b + 1), b + 0.25) for d, b in zip(DECISIONS, BITS, strict=True)
            }
            sites[f"{block}.{kind}"] = SiteFacts(kind, block / 7, 1000, facts)
            hidden[f"{block}.{kind}"] = factor[k] * np.exp(bend * block / 8)
    records = []
    for _ in range(n):
        odds = g.dirichlet([0.6, 1, 1, 0.5])
        policy = Policy({site: (DECISIONS[int(g.choice(4, p=odds))],) for site in sites})
        kl = sum(hidden[s] * facts.choices[policy.at(s)[0]].score for s, facts in sites.items())
        records.append(Record(policy, float(kl * np.exp(g.normal(0, noise)))))
    return Features(sites), records


def test_features_by_hand() -> None:
    a = {DENSE: ChoiceFacts(0.0, 3.0, 16.0), DECISIONS[0]: ChoiceFacts(0.3, 1.0, 2.25)}
    b = {DENSE: ChoiceFacts(0.0, 5.0, 16.0), DECISIONS[2]: ChoiceFacts(0.1, 2.0, 4.25)}
    features = Features({"a": SiteFacts("o", 0.0, 100, a), "b": SiteFacts("down", 1.0, 300, b)})
    policies = [Policy({"a": (DECISIONS[0],), "b": (DECISIONS[2],)}), Policy({"a": (DECISIONS[0],)})]
    rows = [dict(zip(features.names, row, strict=True)) for row in features.matrix(policies).tolist()]
    assert rows[0]["log_score"] == pytest.approx(np.log(0.4))
    assert rows[0]["share:o"] == rows[0]["share:third0"] == rows[0]["max_share"] == pytest.approx(0.75)
    assert rows[0]["share:down"] == rows[0]["share:third2"] == pytest.approx(0.25)
    assert rows[0]["share:third1"] == 0.0
    assert rows[0]["low_bit_share"] == pytest.approx(0.25)
    assert rows[0]["latency_ms"] == pytest.approx(3.0)
    assert rows[0]["bits"] == pytest.approx((100 * 2.25 + 300 * 4.25) / 400)
    assert rows[1]["latency_ms"] == pytest.approx(6.0)
    assert features.score(policies).tolist() == pytest.approx([0.4, 0.3])
    with pytest.raises(ValueError, match="nothing is known of rtn"):
        features.matrix([Policy({"a": (DECISIONS[3],)})])
    with pytest.raises(ValueError, match="nothing is known"):
        features.matrix([Policy({"c": (DECISIONS[0],)})])


def test_bad_facts_are_refused() -> None:
    for facts in (ChoiceFacts(np.nan, 1, 2), ChoiceFacts(0.1, np.inf, 2), ChoiceFacts(-0.1, 1, 2)):
        with pytest.raises(ValueError, match="finite and not negative"):
            Features({"a": SiteFacts("o", 0.0, 1, {DENSE: facts, DECISIONS[0]: ChoiceFacts(0.1, 1, 2)})})


def test_kind_grows_with_the_data() -> None:
    features, records = world(0, 60)
    policies = [record.policy for record in records]
    kinds = [fit_loss(records[:n], features).kind for n in (0, 2, 10, 60)]
    assert kinds == ["offset", "offset", "affine", "lightgbm"]
    mean, std = fit_loss([], features).predict_log(policies[:2])
    assert mean == pytest.approx(np.log(features.score(policies[:2])))
    assert (std > 0).all()


def test_trees_only_where_they_pay() -> None:
    features, records = world(0, 40, bend=0.0)
    assert fit_loss(records, features).kind == "affine"


def test_calibration_recovers_a_power_of_the_score() -> None:
    features, records = world(1, 12, bend=0.0, noise=0.0)
    scores = features.score([record.policy for record in records])
    model = fit_loss([Record(r.policy, 3.0 * float(s) ** 1.2) for r, s in zip(records, scores, strict=True)], features)
    mean, _ = model.predict_log([records[0].policy])
    assert mean[0] == pytest.approx(np.log(3.0 * scores[0] ** 1.2), abs=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_beats_the_score_on_unseen_policies(seed: int) -> None:
    features, records = world(seed, 60)
    report = evaluate_unseen(records, features, seed=seed)
    assert report.n == 60
    assert report.spearman is not None and report.spearman_score is not None
    assert report.spearman > report.spearman_score
    assert report.spearman_in_bands is not None and report.spearman_in_bands > 0.7
    assert 0.8 <= report.coverage <= 1.0
    assert set(report.kinds) == {"lightgbm"}


def test_shuffled_labels_predict_nothing() -> None:
    found = []
    for seed in range(4):
        features, records = world(seed, 24)
        labels = np.random.default_rng(seed).permutation([record.kl for record in records])
        shuffled = [Record(record.policy, float(kl)) for record, kl in zip(records, labels, strict=True)]
        report = evaluate_unseen(shuffled, features)
        assert report.spearman is not None
        found.append(report.spearman)
    assert abs(np.mean(found)) < 0.3


def test_a_policy_recorded_twice_stays_in_one_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    features, records = world(2, 12)
    fitted: list[set[str]] = []
    asked: list[set[str]] = []
    predict = LossModel.predict

    def spy_fit(given: list[Record], *rest: object) -> LossModel:
        fitted.append({record.policy.key() for record in given})
        return fit_loss(given, features)

    def spy_predict(model: LossModel, policies: list[Policy], coverage: float) -> object:
        asked.append({policy.key() for policy in policies})
        return predict(model, policies, coverage)

    monkeypatch.setattr("predictors.loss.fit_loss", spy_fit)
    monkeypatch.setattr(LossModel, "predict", spy_predict)
    report = evaluate_unseen(records + [Record(r.policy, 1.01 * r.kl) for r in records], features)
    assert report.n == 12 and len(fitted) == 5
    assert all(not known & new for known, new in zip(fitted, asked, strict=True))
    assert set.union(*asked) == {record.policy.key() for record in records}


def test_bands_compare_only_policies_of_equal_latency() -> None:
    """Across latencies the score is right, within a band it is upside down: the band correlation must say so."""
    sites: dict[str, SiteFacts] = {}
    for i in range(2):
        scores = [(0.1 * (g + 1) + 0.001 * j, 10.0 / (g + 1) + 0.001 * j) for g in range(4) for j in range(5)]
        sites[f"s{i}"] = SiteFacts(
            "o", float(i), 10, {Decision.of("m", k=k): ChoiceFacts(s, t / 2, 4.0) for k, (s, t) in enumerate(scores)}
        )
    features = Features(sites)
    records = []
    for g in range(4):
        for j in range(5):
            decision = Decision.of("m", k=5 * g + j)
            records.append(Record(Policy({"s0": (decision,), "s1": (decision,)}), 0.2 * (g + 1) - 0.002 * j))
    report = evaluate_unseen(records[:15], features)
    assert report.spearman is not None and report.spearman > 0.7
    assert report.spearman_in_bands == pytest.approx(-1.0) and report.n_in_bands == 15


def test_deterministic_whatever_the_order(capfd: pytest.CaptureFixture[str]) -> None:
    features, records = world(3, 30)
    policies = [record.policy for record in records[:5]]
    first, again = fit_loss(records, features, 1), fit_loss(records[::-1], features, 1)
    assert first.kind == "lightgbm"
    assert first.predict_log(policies)[0].tolist() == again.predict_log(policies)[0].tolist()
    assert evaluate_unseen(records, features) == evaluate_unseen(records[::-1], features)
    assert capfd.readouterr().out == ""  # LightGBM would warn on stdout, where results go


def test_bad_records_are_refused() -> None:
    features, records = world(0, 5)
    with pytest.raises(ValueError, match="at least 6"):
        evaluate_unseen(records, features)
    for kl in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="positive"):
            Record(records[0].policy, kl)

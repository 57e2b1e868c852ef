import dataclasses

import pytest

from predictors.latency import LatencyModel
from profilers.runtime import dense_candidates
from search.config import RunConfig
from search.differencing import Differenced, difference
from search.pricing import price, priced_sites
from search.progress import Progress
from search.session import Session
from search.whole_model import whole_model
from tests.search.run_server import fixed_prices
from tests.tiny import save_tiny


def test_a_map_whose_slope_is_right_agrees_with_the_blocks_and_one_that_is_not_does_not(tmp_path) -> None:
    """A step takes what its weights have bytes, so the blocks that are taken away save what their kernels do."""
    model = save_tiny(tmp_path / "model")
    config = RunConfig(
        model=str(model),
        latency="0.7x",
        workload="decode:batch=1,context=8",
        formats=("w8a8-token", "w4a8-g32-asym"),
        results=str(tmp_path / "results"),
        cache=str(tmp_path / "cache"),
        threads=1,
    )
    session = Session(config, Progress(quiet=True))
    with fixed_prices():
        table = price(session)
        (sites,) = priced_sites(session, table)
        fit = whole_model(session, table, sites, config.load)
        found = Differenced(**fit["blocks"])
        assert found.blocks == 2 and found.lo <= found.saved_ms <= found.hi
        assert found.saved_ms == pytest.approx(found.predicted_ms, rel=0.05) and not found.disagrees
        assert f"{found.saved_ms:.3g} ms" in found.words
        map_ = LatencyModel.from_dict(fit["map"])
        engine = session.engine(table)
        dense = dense_candidates(engine)[fit["dense_name"]]
        steep = dataclasses.replace(map_, b1=2 * map_.b1)
        wrong = difference(session, engine, sites, config.load, dense, steep, fit["scales"])
        assert wrong is not None and wrong.disagrees and wrong.predicted_ms == pytest.approx(2 * found.predicted_ms)

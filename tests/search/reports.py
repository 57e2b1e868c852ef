"""A finished study as a report sees it, with hostile text in every place that comes from outside."""

from typing import Any

from methods.policy import Decision, Policy
from predictors.intervals import Interval
from predictors.loss import PredictorReport
from search.frontier import Candidate, Fidelity
from search.report.content import TOP1, DataUse, Entry, Guard, LatencyFit, Objective, ReportData
from search.report.honesty import Pair
from search.report.limits import Limit, Share

EVIL = '<script>alert("x")</script>&'
W4 = Decision.of("gptq", format="w4a8-g64")
W8 = Decision.of("rtn", format="w8a8-token")
SITES = [(f"{block}.{kind}", kind, block) for block in range(3) for kind in ("q+k+v", "down")]
POLICY = Policy({"0.q+k+v": (W4,), "1.down": (W8,), "2.down": (W4,)})


def candidate(name: str, kl: float, latency: float, **other: Any) -> Candidate:
    fields: dict[str, Any] = {
        "policy": POLICY,
        "fidelity": Fidelity.MEASURED,
        "kl_stderr": 0.01,
        "latency_lo": latency - 0.1,
        "latency_hi": latency + 0.1,
        "size_bytes": int(latency * 2**20),
        "role": "report",
        "latency_label": "measured",
    }
    return Candidate(name=name, kl=kl, latency_ms=latency, **{**fields, **other})


def predicted(kl: float, latency: float) -> Candidate:
    unknown = {"fidelity": Fidelity.PREDICTED, "kl_stderr": 0.0, "role": "", "latency_label": "modelled"}
    return candidate(f"solved {latency}", kl, latency, **unknown)


def data(**other: Any) -> ReportData:
    fields: dict[str, Any] = {
        "study": "s",
        "model": f"tiny {EVIL}",
        "target": "cpu",
        "objective": Objective("0.6x", 6.0, "ms per output token", "decode:batch=1,context=8"),
        "verdict": "met",
        "measured": (
            Entry(
                candidate("dense", 0.0, 10.0, kl_stderr=0.0, scores={"perplexity": 20.0, TOP1: 1.0}),
                "dense",
                met=(("0.6x", False),),
            ),
            Entry(candidate("the mix", 0.123, 5.5, scores={"perplexity": 22.5, TOP1: 0.975}), "chosen", met=(("0.6x", True),)),
            Entry(candidate("other mix", 0.3, 5.0), "search", met=(("0.6x", True),)),
            Entry(candidate(f"uniform {EVIL}", 0.4, 5.7), "baseline", met=(("0.6x", True),)),
        ),
        "predicted": (predicted(0.5, 4.0), predicted(0.1, 7.0)),
        "sites": tuple(SITES),
        "dense_format": "bf16",
        "guard": Guard(True, "uniform w4", Interval(-0.2, -0.3, -0.1), 12),
        "latency_fits": (LatencyFit("decode", "T = 1.2 + 1.1 · kernels", 12, 0.01, 0.025, 0.9, f"Blocks {EVIL}."),),
        "predictor": PredictorReport(
            40, 0.97, 0.95, None, 0, 0.08, 0.925, 0.9, ("lightgbm", "affine"), ((0.1, 0.05, 0.2, 0.3),)
        ),
        "shadow_price": 0.021,
        "data": (DataUse("report", f"text {EVIL}", 4096, "abcd"),),
        "cost": (("policies", "40"),),
        "provenance": (("device", EVIL),),
        "notes": (f"contended {EVIL}",),
        "limits": (
            Limit(f"down {EVIL}", 1, "w4a8-g64", 0.05, 0.04, "w8a8-token", 0.045, 0.02),
            Limit("q+k+v", 0, "w8a8-token", 0.01, 0.03),
        ),
        "shares": (Share("down", 1.5), Share("all else", 4.5)),
        "latency_pairs": {
            "decode:batch=1,context=512": (Pair(0.55, 0.5, 0.6, 0.57), Pair(0.7, 0.68, 0.72, 0.6)),
            "prefill:batch=1,prompt=512": (Pair(0.9, 0.8, 1.0, 0.95),),
        },
    }
    return ReportData(**{**fields, **other})

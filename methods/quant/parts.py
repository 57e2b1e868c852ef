"""The parts by slot and name: each line fits a pure function in a file of its own to the slot's signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.sides import columns, elements
from methods.method import Need, SiteView, Stats
from methods.quant.adaround import Rectified, steady
from methods.quant.bcq import bcq
from methods.quant.clip import by_clip
from methods.quant.columns import by_loud_columns
from methods.quant.flexround import Divided
from methods.quant.four_six import four_six
from methods.quant.gobo import by_density, by_gobo
from methods.quant.grid import Grid
from methods.quant.hqq import hqq
from methods.quant.imatrix import imatrix
from methods.quant.incoherence import by_block_hadamard, by_incoherence, by_rms
from methods.quant.kl import kl
from methods.quant.learned import Learner, adam
from methods.quant.lkd import Latent
from methods.quant.low_rank import by_error, by_mean_input, by_output
from methods.quant.minmax import minmax
from methods.quant.mse import mse
from methods.quant.olive import as_pairs, by_pair_scale, by_pairs
from methods.quant.omniquant import Clipped, adam_scaled, equivalent_scale
from methods.quant.outliers import of_the_rest
from methods.quant.owq import by_sensitive_columns
from methods.quant.percentile import percentile
from methods.quant.pow2 import pow2_each, pow2_ratio
from methods.quant.residual import residual
from methods.quant.rounders import by_chance, by_drift, by_feedback, by_ldlq, by_nearest, by_obq, refined
from methods.quant.scaling import by_awq, by_gamma, by_log_equalize, by_outlier_plus, by_pre_shift, by_smooth
from methods.quant.signround import Offsets, signed
from methods.quant.split_merge import by_disassembly, by_reassembly
from methods.quant.spqr import by_leave_one_out, by_outliers
from methods.quant.squeezellm import by_fisher, by_sensitivity
from methods.quant.static_range import by_clusters, by_groups, by_quiet_range, by_range, by_scale_search, by_token_clip
from methods.quant.task import Change, Knobs, Rounded, Task

Transform = Callable[[SiteView, Mapping[str, Stats], Format, Knobs], Change]
Partition = Callable[[Task], Tensor]
"""-> (d_out, d_in) bool, the elements that leave the grid."""
Fitter = Callable[[Task], Grid]
Rounder = Callable[[Task, Grid], Rounded]
Compensator = Callable[[Task, Tensor], Mapping[str, Tensor]]
"""(task, what the payload decodes to so far (d_out, d_in)) -> further parts of the payload."""


TRANSFORMS: Mapping[str, Transform] = {
    "smooth": by_smooth,
    "awq": by_awq,
    "log-equalize": by_log_equalize,
    "outlier-plus": by_outlier_plus,
    "gamma": by_gamma,
    "pre-shift": by_pre_shift,
    "incoherence": by_incoherence,
    "block-hadamard": by_block_hadamard,
    "reassembly": by_reassembly,
}

PARTITIONS: Mapping[str, Partition] = {
    "loud-columns": by_loud_columns,
    "sensitive-columns": by_sensitive_columns,
    "leave-one-out": by_leave_one_out,
    "sensitive-or-large": by_sensitivity,
    "unlikely": by_density,
}

_FITTERS: Mapping[str, Fitter] = {
    "minmax": lambda task: minmax(task.weight, task.fmt),
    "mse": lambda task: mse(task.weight, task.fmt),
    "pow2-m1": lambda task: pow2_each(task.weight, task.fmt),
    "pow2-m2": lambda task: pow2_ratio(task.weight, task.fmt),
    "hqq": lambda task: hqq(task.weight, task.fmt, int(task.knobs["iterations"])),
    "kl": lambda task: kl(task.weight, task.fmt),
    "percentile": lambda task: percentile(task.weight, task.fmt, task.number("percent")),
    "output-clip": by_clip,
    "rms": by_rms,
    "fisher": by_fisher,
    "gobo": by_gobo,
    "pairs": by_pair_scale,
    "bcq": lambda task: bcq(task.weight, task.fmt, int(task.knobs["rounds"])),
    "four-six": lambda task: four_six(task.weight, task.fmt, int(task.knobs["end"])),
    "imatrix": lambda task: imatrix(task.weight, task.statistic(Need.HESSIAN).diagonal(), task.fmt, int(task.knobs["steps"])),
}

FITTERS: Mapping[str, Fitter] = {name: of_the_rest(fit) for name, fit in _FITTERS.items()}

ROUNDERS: Mapping[str, Rounder] = {
    "nearest": by_nearest,
    "pairs": by_pairs,
    "stochastic": by_chance,
    "feedback": by_feedback,
    "feedback-drift": by_drift,
    "feedback-outliers": by_outliers,
    "ldlq": by_ldlq,
    "obq": by_obq,
    "nearest+greedy": refined(by_nearest),
    "feedback+greedy": refined(by_feedback),
    "ldlq+greedy": refined(by_ldlq),
}

COMPENSATORS: Mapping[str, Compensator] = {
    "lorc": by_error,
    "lqer": by_mean_input,
    "qera": by_output,
    "residual": residual,
    "pairs": as_pairs,
    "static-range": by_range,
    "static-quiet": by_quiet_range,
    "static-clusters": by_clusters,
    "static-groups": by_groups,
    "token-clip": by_token_clip,
    "scale-search": by_scale_search,
    "disassembly": by_disassembly,
}

LEARNERS: Mapping[str, Learner] = {
    "adaround": Learner(Rectified, steady, scope="layer"),
    "adaround-block": Learner(Rectified, steady),
    "flexround": Learner(Divided, adam),
    "signround": Learner(Offsets, signed),
    "omniquant": Learner(Clipped, adam_scaled, scale=equivalent_scale),
    "lkd": Learner(Latent, adam),
}


def side_of(kept: Tensor, values: Tensor) -> dict[str, Tensor]:
    """The payload parts of kept elements: whole columns where the mask is made of them, sparse rows otherwise."""
    whole = kept.all(0)
    if torch.equal(whole.expand_as(kept), kept):
        return columns(values, whole.nonzero()[:, 0])
    return elements(values, kept)

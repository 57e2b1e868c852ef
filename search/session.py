"""`Session`: the heavy things of a run (model, target, text, bank, store), each made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from methods import catalogue
from methods.apply import site_view
from methods.bank import Bank, Kept
from methods.formats.format import Format, parse_format
from methods.formats.halves import in_halves
from methods.method import Edit
from methods.model.experts import experts_per_token
from methods.model.load import LoadedModel, load
from methods.model.structure import Site
from methods.model.tokenizer import check_ids
from methods.model.trace import probe_tokens
from methods.policy import DENSE, Decision, Policy
from predictors.absent import Elsewhere
from profilers.cells import site_cells
from profilers.kernels.catalogue import supported, why_none
from profilers.kv_cache import new_cache
from profilers.resolution import resolve
from profilers.runtime import Runtime
from profilers.table import KernelKey, LatencyTable
from profilers.target import Target, TargetError, local_cpu
from profilers.workload import Workload
from search.config import RunConfig, device_folders
from search.data import ROLES, Corpus, generate_tokens, parse_sources, roles_from_text, roles_from_tokens
from search.documents import SHIPPED
from search.evaluate import Switch
from search.files import Steps, content_key, kept_tensors
from search.fit import sequence_length, sequence_notes, workload_notes
from search.memory import give_back
from search.progress import Progress
from search.room import check_texts
from search.transform import transformed
from spaces.runtimes import default_formats, runtime
from spaces.space import Space, build

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


class Session:
    """One run's things. `config` says what, `progress` hears what takes long."""

    def __init__(self, config: RunConfig, progress: Progress, target: Target | None = None) -> None:
        """target: what `config.target` stands for, where the caller has resolved it."""
        self.config, self.progress = config, progress
        self._target = target

    @cached_property
    def steps(self) -> Steps:
        """What the study has finished."""
        return Steps(self.config.folder / "steps")

    @cached_property
    def target(self) -> Target:
        """The target; raises TargetError where it cannot be measured and nothing is known of it."""
        config = self.config
        if self._target is not None:
            return self._target
        folders = device_folders(config.devices)
        return resolve(config.target, folders, config.threads or None, allow_modelled=config.allow_modelled)

    @property
    def target_identity(self) -> str:
        """What a study's target is known by: the device here by its fingerprint, one that was named by its name."""
        return self.target.fingerprint if self.config.target in ("cpu", "cuda") else self.config.target

    @cached_property
    def stored(self) -> LoadedModel:
        """The model as it is stored; where the run transforms it, its weights are another's once `loaded` was asked for."""
        spec = None if self.config.model == "default" else self.config.model
        with self.progress.busy("loading the model"):
            loaded = load(spec, self.config.cache_folder, log=self.progress.say)
        give_back()  # a conversion holds the model twice
        check_texts(self.config, loaded.structure)
        n = loaded.structure.n_parameters
        self.progress.say(
            f"{loaded.label}: {loaded.structure.architecture}, {n / 1e6:.0f} M parameters, {loaded.structure.dtype}"
        )
        return loaded

    @cached_property
    def loaded(self) -> LoadedModel:
        """Model, tokenizer and structure of everything that the run decides, computes and measures."""
        decision = self.config.transform_decision
        if decision is None:
            return self.stored
        # The text first: a model that writes its own does so as it is stored, so that every transform is judged on the same.
        batches = self.corpora["calibrate"].sequences()
        return transformed(self.stored, decision, batches, self.config.cache_folder, self.progress)

    @property
    def model(self) -> torch.nn.Module:
        """The dense model, fp32 compute."""
        model: torch.nn.Module = self.loaded.model
        return model

    def engine(self, table: LatencyTable, workload: Workload | None = None) -> Runtime:
        """What materialises policies on the target's kernels, the best ones for a workload (default: the main one).

        It reads the model's weights, so what an evaluation had installed in the model is taken out.
        """
        self.switch.dense()
        give_back()
        return Runtime(self.model, self.loaded.structure, self.target, table, workload or self.config.load)

    @cached_property
    def space(self) -> Space:
        """The legal choices of every site."""
        engine = runtime(self.config.runtime)
        formats = self.config.formats or default_formats(self.config.runtime, [load.phase for load in self.config.workloads])

        def kernels(fmt: Format, site: Site) -> str | None:
            cell = self.cell(site, fmt)
            if self.target.table is not None or self.target.sister_table is not None:
                return self.absent_reason(site, fmt)
            if supported(fmt, cell.n, cell.k, cell.m, self.target):
                return None
            return why_none(fmt, cell.n, cell.k, cell.m, self.target)

        structure = self.loaded.structure
        # Other exports than a dense one hold dense weights in the checkpoint's own dtype alone.
        dtype = self.target.compute_dtype if set(self.config.export) <= {"dense"} else ""
        with self.progress.busy("finding the kernels, compiled where they are not yet"):
            return build(structure, formats, self.config.methods, engine, kernels, dtype)

    def cell(self, site: Site, fmt: Format) -> KernelKey:
        """The table's cell of a site under a format."""
        return site_cells(site, fmt, self.config.load.tokens_in_flight, self.experts_per_token)[0][0]

    @cached_property
    def elsewhere(self) -> Elsewhere:
        """What is known of the target where it is not here."""
        return Elsewhere(self.target)

    def absent_reason(self, site: Site, fmt: Format) -> str | None:
        """Why the tables of a target that is not here cannot price a site under a format, or None."""
        cell = self.cell(site, fmt)
        return (
            None
            if self.elsewhere.rows(cell)
            else f"no latency of it at m={cell.m}, n={cell.n}, k={cell.k} on {self.target.name}"
        )

    @cached_property
    def experts_per_token(self) -> int:
        """Experts that each token visits; 0 in a dense model."""
        return experts_per_token(self.loaded.model, probe_tokens(self.loaded.structure.n_vocab))

    @cached_property
    def corpora(self) -> Mapping[str, Corpus]:
        """The text of all roles, cached where the model writes it itself."""
        config, structure = self.config, self.stored.structure
        length = sequence_length(self.stored, config.sequence)
        tokens = {
            "calibrate": config.calibration_tokens,
            "search": config.search_tokens,
            "validate": config.validation_tokens,
            "report": config.validation_tokens,
        }
        sizes = {role: -(-tokens[role] // length) for role in ROLES}
        sources = parse_sources(config.data)
        unread = self.stored.tokenizer is None and config.data == (SHIPPED,)
        if sources and not unread:
            if self.stored.tokenizer is None:
                raise ValueError(
                    f"{self.stored.source}: no tokenizer, so --data cannot be read; leave it out or add tokenizer.json"
                )
            corpora = roles_from_text(sources, self.stored.tokenizer, sizes, length, config.seed)
            for role, corpus in corpora.items():
                check_ids(corpus.tokens, self.stored.model, self.stored.tokenizer, f"--data {corpus.source} ({role})")
            return corpora
        key = content_key(self.stored.digest, length, sum(sizes.values()), config.seed, structure.n_vocab)
        path = config.cache_folder / "generated" / f"{key}.safetensors"
        return roles_from_tokens(self._generated(path, sum(sizes.values()), length), sizes)

    @cached_property
    def fit_notes(self) -> tuple[str, ...]:
        """What is to be said of the model's length beside what the run wants of it; raises ConfigError where it is too short."""
        config = self.config
        return (*sequence_notes(self.stored, config.sequence), *workload_notes(self.stored, config.workloads))

    def _generated(self, path: Path, n_sequences: int, length: int) -> Tensor:
        def make() -> dict[str, Tensor]:
            self.progress.say(f"the model writes {n_sequences} sequences of {length} tokens itself (kept for later runs)")
            with self.progress.bar("writing text") as update, all_threads():
                writer = Runtime(self.stored.model, self.stored.structure, self._machine()).materialize({})
                return {"tokens": generate_tokens(writer, new_cache, n_sequences, length, self.config.seed, update)}

        return kept_tensors(path, make, self.progress.say)["tokens"]

    def _machine(self) -> Target:
        """What writes text: the target where it is here, else this machine's CPU."""
        try:
            target = self.target
        except TargetError:
            return local_cpu()
        return target if target.present else local_cpu()

    @cached_property
    def calibration(self) -> str:
        """Hash of the calibration text; what a study used is set where the text itself is not needed again."""
        return self.corpora["calibrate"].sha256

    @cached_property
    def bank(self) -> Bank:
        """Compressed tensors of every (site, decision) of this model and this calibration."""
        return Bank(self.bank_folder)

    @cached_property
    def bank_folder(self) -> Path:
        """Named by model, calibration text and the methods' revision, so that a changed one finds another bank."""
        return self.config.folder / "bank" / content_key(self.loaded.digest, self.calibration, catalogue.REVISION)

    def held(self, edit: Edit) -> Edit:
        """An edit as the files of the study's runtime hold it: what they would round is rounded before it is judged."""
        engine = runtime(self.config.runtime)
        if not (engine.halves or (self.loaded.structure.dtype == "fp16" and engine.loads is not None)):
            return edit
        return replace(edit, linears={name: in_halves(compressed) for name, compressed in edit.linears.items()})

    def edit(self, site: str, decision: Decision) -> Edit:
        """What a decision made of a site, from the bank."""
        return self.bank.get(site, decision)

    @cached_property
    def switch(self) -> Switch:
        """What installs policies into the model."""
        return Switch(self.model, self.loaded.structure, self.edit)

    def edits(self, policy: Policy) -> Mapping[str, Edit]:
        """The edits of all sites that a policy compresses, each read from the bank when it is asked for."""
        sites = [site.name for site in self.loaded.structure.sites]
        return Kept(self.bank, {site: policy.at(site)[0] for site in sites if policy.at(site)[0] != DENSE})

    def norm_of(self, site: Site) -> Any:
        """The norm that a scale at this site would fold into, or None."""
        return site_view(self.model, self.loaded.structure, site).norm

    @property
    def dense_format(self) -> Format:
        """The format that sites have when nothing is decided."""
        return parse_format(self.loaded.structure.dtype)


@contextmanager
def all_threads() -> Iterator[None]:
    """Computing, as opposed to timing, may use every core."""
    import os

    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


Log = Callable[[str], None]

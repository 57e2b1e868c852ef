"""Compressing a whole policy in order: each block calibrated on what the compressed blocks before it put out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from methods import catalogue
from methods.apply import site_view
from methods.bank import Bank, Kept
from methods.calibrate import sweep
from methods.method import Edit, Stats
from methods.model.structure import Site
from methods.policy import DENSE, Decision, Policy
from search.session import Session, all_threads

ORDER_PAYS = 0.05
"""Nats per token from which on an answer is compressed again in order.

On SmolLM2-135M, GPTQ in groups of 64 lost 13 % less in order at 3 bits (KL 1.1) and 1 % less at 4 (KL .27); four answers of KL .02 to
.05 lost at most 3 % less, one of them more.
"""


def ordered_bank(session: Session, policy: Policy) -> Bank:
    """Where a study keeps a policy's weights that were made in order."""
    return Bank(session.bank_folder / "in-order" / policy.key())


def stored(session: Session, policy: Policy, bank: Bank) -> Kept:
    """A policy's edits in a bank, each read when it is asked for; raises KeyError where one is missing."""
    found = {site.name: policy.at(site.name)[0] for site in session.loaded.structure.sites if policy.at(site.name)[0] != DENSE}
    for site, decision in found.items():
        if not bank.has(site, decision):
            bank.get(site, decision)
    return Kept(bank, found)


def needs_order(policy: Policy) -> bool:
    """Whether any decision depends on calibration, so that compressing in order changes something."""
    return any(catalogue.needs(decisions) for decisions in policy.sites.values())


def compress_in_order(
    session: Session,
    policy: Policy,
    bank: Bank,
    name: str,
    finished: Callable[[int, Mapping[str, Edit]], None] | None = None,
) -> Kept:
    """The policy's edits by site: what the bank holds is taken from there, and the rest is made and kept in it.

    finished(block, its edits) is called when a block is done. Memory: the model, and one block's statistics and edits.
    """
    structure = session.loaded.structure
    chosen = {site.name: policy.at(site.name)[0] for site in structure.sites if policy.at(site.name)[0] != DENSE}

    def visit(block: int, stats: Mapping[str, Stats]) -> dict[str, Edit]:
        own = {site.name: site for site in structure.in_block(block) if site.name in chosen}
        kept = {name: bank.get(name, chosen[name]) for name in own if bank.has(name, chosen[name])}
        views = [site_view(session.model, structure, site) for name, site in own.items() if name not in kept]
        new = {name: session.held(edit) for name, edit in catalogue.apply_block(views, stats, chosen, kept).items()}
        for name, edit in new.items():
            bank.put(name, chosen[name], edit)
        found = {name: kept[name] if name in kept else new[name] for name in own}
        if finished is not None:
            finished(block, found)
        return found

    kept_blocks = [block for block in range(len(structure.blocks)) if _kept_whole(structure.in_block(block), chosen, bank)]
    if len(kept_blocks) == len(structure.blocks) and finished is None:
        return stored(session, policy, bank)
    if len(kept_blocks) == len(structure.blocks) or not needs_order(policy):
        for block in range(len(structure.blocks)):
            visit(block, {})
        return stored(session, policy, bank)
    session.switch.dense()
    with session.progress.bar(name) as update, all_threads():

        def reported(block: int, stats: Mapping[str, Stats]) -> dict[str, Edit]:
            own = visit(block, stats)
            update(block + 1, len(structure.blocks), sum(before <= block for before in kept_blocks))
            return own

        needs = {site: catalogue.needs([decision]) for site, decision in chosen.items()}
        sweep(session.model, structure, session.corpora["calibrate"].sequences(), needs, reported)
    return stored(session, policy, bank)


def _kept_whole(sites: Sequence[Site], chosen: Mapping[str, Decision], bank: Bank) -> bool:
    """Whether a bank has everything that is decided at the sites, so that nothing is left to compute there."""
    return all(bank.has(site.name, chosen[site.name]) for site in sites if site.name in chosen)

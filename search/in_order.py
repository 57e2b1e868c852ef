"""Compressing a whole policy in order: each block calibrated on what the compressed blocks before it put out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from methods import catalogue
from methods.apply import site_view
from methods.bank import Bank
from methods.calibrate import sweep
from methods.method import Edit, Stats
from methods.model.structure import Site
from methods.policy import DENSE, Decision, Policy
from search.session import Session, all_threads


def ordered_bank(session: Session, policy: Policy) -> Bank:
    """Where a study keeps a policy's weights that were made in order."""
    return Bank(session.bank_folder / "in-order" / policy.key())


def stored(session: Session, policy: Policy, bank: Bank) -> dict[str, Edit]:
    """A policy's edits from a bank; raises KeyError where one is missing."""
    sites = [site.name for site in session.loaded.structure.sites if policy.at(site.name)[0] != DENSE]
    return {site: bank.get(site, policy.at(site)[0]) for site in sites}


def needs_order(policy: Policy) -> bool:
    """Whether any decision depends on calibration, so that compressing in order changes something."""
    return any(catalogue.needs(decisions) for decisions in policy.sites.values())


def compress_in_order(
    session: Session,
    policy: Policy,
    bank: Bank | None,
    name: str,
    finished: Callable[[int, Mapping[str, Edit]], None] | None = None,
) -> dict[str, Edit]:
    """The policy's edits by site. With a bank, what it holds is taken from there and the rest is kept in it.

    finished(block, its edits) is called when a block is done.
    """
    structure = session.loaded.structure
    chosen = {site.name: policy.at(site.name)[0] for site in structure.sites if policy.at(site.name)[0] != DENSE}
    result: dict[str, Edit] = {}

    def visit(block: int, stats: Mapping[str, Stats]) -> dict[str, Edit]:
        own = {site.name: site for site in structure.in_block(block) if site.name in chosen}
        kept = {name: bank.get(name, chosen[name]) for name in own if bank is not None and bank.has(name, chosen[name])}
        views = [site_view(session.model, structure, site) for name, site in own.items() if name not in kept]
        new = {name: session.held(edit) for name, edit in catalogue.apply_block(views, stats, chosen, kept).items()}
        for name, edit in new.items():
            if bank is not None:
                bank.put(name, chosen[name], edit)
        result.update({name: kept[name] if name in kept else new[name] for name in own})
        if finished is not None:
            finished(block, {name: result[name] for name in own})
        return {name: result[name] for name in own}

    if all(bank is not None and bank.has(site, decision) for site, decision in chosen.items()) or not needs_order(policy):
        for block in range(len(structure.blocks)):
            visit(block, {})
        return result
    session.switch.dense()
    kept_blocks = [block for block in range(len(structure.blocks)) if _kept_whole(structure.in_block(block), chosen, bank)]
    with session.progress.bar(name) as update, all_threads():

        def reported(block: int, stats: Mapping[str, Stats]) -> dict[str, Edit]:
            own = visit(block, stats)
            update(block + 1, len(structure.blocks), sum(before <= block for before in kept_blocks))
            return own

        needs = {site: catalogue.needs([decision]) for site, decision in chosen.items()}
        sweep(session.model, structure, session.corpora["calibrate"].sequences(), needs, reported)
    return result


def _kept_whole(sites: Sequence[Site], chosen: Mapping[str, Decision], bank: Bank | None) -> bool:
    """Whether a bank has everything that is decided at the sites, so that nothing is left to compute there."""
    return bank is not None and all(bank.has(site.name, chosen[site.name]) for site in sites if site.name in chosen)

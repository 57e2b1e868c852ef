"""Compressing a whole policy in order: each block calibrated on what the compressed blocks before it put out."""

from __future__ import annotations

from collections.abc import Mapping

from methods import catalogue
from methods.apply import site_view
from methods.bank import Bank
from methods.calibrate import sweep
from methods.method import Edit, Stats
from methods.policy import DENSE, Policy
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


def compress_in_order(session: Session, policy: Policy, bank: Bank | None, name: str) -> dict[str, Edit]:
    """The policy's edits by site. With a bank, what it holds is taken from there and the rest is kept in it."""
    structure = session.loaded.structure
    chosen = {site.name: policy.at(site.name)[0] for site in structure.sites if policy.at(site.name)[0] != DENSE}
    result: dict[str, Edit] = {}

    def edit(site_name: str, stats: Mapping[str, Stats]) -> Edit:
        decision = chosen[site_name]
        if bank is not None and bank.has(site_name, decision):
            return bank.get(site_name, decision)
        made = catalogue.apply(site_view(session.model, structure, structure.site(site_name)), stats, decision)
        if bank is not None:
            bank.put(site_name, decision, made)
        return made

    if all(bank is not None and bank.has(site, decision) for site, decision in chosen.items()) or not needs_order(policy):
        return {site: edit(site, {}) for site in chosen}
    session.switch.dense()
    with session.progress.bar(name) as update, all_threads():

        def visit(block: int, stats: Mapping[str, Stats]) -> dict[str, Edit]:
            own = {site.name: edit(site.name, stats) for site in structure.in_block(block) if site.name in chosen}
            result.update(own)
            update(block + 1, len(structure.blocks))
            return own

        needs = {site: catalogue.needs([decision]) for site, decision in chosen.items()}
        sweep(session.model, structure, session.corpora["calibrate"].sequences(), needs, visit)
    return result

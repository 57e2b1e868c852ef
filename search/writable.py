"""Which exports the answer of a run can have, told before anything is calibrated: by the model, its tokenizer and the formats tried."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from methods.policy import DENSE
from search.config import ConfigError, RunConfig
from search.deliver import asked_for, export_formats
from search.export.registry import EXPORTERS, Exporter, exporter
from search.words import shortened

if TYPE_CHECKING:
    from methods.formats.format import Format
    from methods.model.load import LoadedModel
    from spaces.space import Space


def formats_of(space: Space) -> list[Format]:
    """The formats that a search can choose, besides leaving a site as it is."""
    return sorted({choice.format for choices in space.choices.values() for choice in choices if choice.decision != DENSE})


def unwritable(name: str, loaded: LoadedModel, formats: Collection[Format]) -> dict[str, str]:
    """Why a model is not written as `name`, by the formats for which that holds: at every site that the export takes a format at."""
    module = exporter(name)
    reasons = {fmt.name: _reason(module, loaded, fmt) for fmt in formats}
    return {fmt: reason for fmt, reason in reasons.items() if reason}


def _reason(module: Exporter, loaded: LoadedModel, fmt: Format) -> str:
    """Why it is not written in a format, "" where it is; what the model itself stands against comes first."""
    refused = {site: module.supports(fmt, site) for site in loaded.structure.sites}
    able = [site for site, reason in refused.items() if reason is None]
    try:
        module.check_model(loaded, {layer.name: fmt for site in able or refused for layer in site.layers})
    except ValueError as error:
        return str(error)
    return "" if able else next(reason for reason in refused.values() if reason)


def check_exports(config: RunConfig, loaded: LoadedModel, space: Space) -> list[str]:
    """Notes on exports that a run was asked for and that some answers cannot have.

    Raises ConfigError for one that no answer of this model can have, by its name and with the reason.
    """
    formats, notes = formats_of(space), []
    for name in export_formats(config):
        refused = unwritable(name, loaded, formats)
        if len(refused) == len(formats):
            ((reason, _),) = Counter(refused.values()).most_common(1)
            if not asked_for(config, name):
                notes.append(f"no answer can be exported as {name}: {reason}")
                continue
            cause = f"--export {name}" if config.export else f"--runtime {config.runtime}"
            raise ConfigError(f"{cause}: no answer of this model in {shortened(refused)} can be exported as {name}: {reason}")
        if refused:
            fmt, reason = next(iter(refused.items()))
            more = f" ({len(refused)} of {len(formats)} formats)" if len(refused) > 1 else ""
            notes.append(f"an answer with {fmt} is not exported as {name}: {reason}{more}")
    return notes


def listed(loaded: LoadedModel, space: Space) -> str:
    """Every export format with the formats of the search that it can hold: what an answer can be exported as."""
    formats = formats_of(space)
    held = {name: _held(unwritable(name, loaded, formats), formats) for name in EXPORTERS}
    able = [f"{name}{f' ({told})' if told != 'all' else ''}" for name, told in held.items() if told]
    never = [name for name, told in held.items() if not told]
    return ", ".join(able) + (f"; not {', '.join(never)}" if never else "")


def _held(refused: Mapping[str, str], formats: Collection[Format]) -> str:
    left = [fmt.name for fmt in formats if fmt.name not in refused]
    return "all" if len(left) == len(formats) else ", ".join(left)

"""The report as one self-contained HTML page: no network, and complete without its script."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from methods.atomic import write_text
from methods.formats.format import parse_format
from search.frontier import Candidate, Fidelity
from search.report.content import LayerMap, ReportData, answer, guard_words
from search.report.explorer import Look, explorer
from search.report.honesty import draw_pairs, latency_panel, loss_panel
from search.report.picture import draw
from search.report.table import Table, candidate_table, predicted_table

_STYLE = """
:root { --ink: #1f2430; --soft: #5b6270; --line: #e2e5ea; --paper: #ffffff; --wash: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", "Helvetica Neue", sans-serif; }
main { max-width: 1060px; margin: 24px auto; padding: 32px 40px; background: var(--paper); border: 1px solid var(--line); }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 2px; }
h2 { font-size: 17px; margin: 36px 0 10px; padding-bottom: 5px; border-bottom: 1px solid var(--line); }
p { margin: 6px 0; } .soft { color: var(--soft); font-size: 13.5px; }
.answer { margin: 20px 0; padding: 14px 18px; border-left: 5px solid; background: var(--wash); }
.answer.met { border-color: #009e73; } .answer.not-met { border-color: #d55e00; } .answer.unvalidated { border-color: #e69f00; }
.answer b.verdict { font-size: 17px; }
.scroll { overflow-x: auto; margin: 6px 0 14px; } td:first-child { min-width: 9em; } .map td:first-child { min-width: 0; }
 img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); } td.n, th.n { text-align: right; } td.n { white-space: nowrap; }
tr.chosen td { background: #e8f5f0; font-weight: 600; }
.predicted td:nth-child(5):last-child { min-width: 12em; }
.predicted { padding: 4px 18px 14px; border: 1px dashed #8a8f98; background: var(--wash); }
.map td, .map th { padding: 0; border: 1px solid var(--paper); text-align: center; font-size: 11px; }
.map td { width: 26px; height: 24px; } .map th { color: var(--soft); font-weight: 400; padding: 0 8px 0 0; white-space: nowrap; }
.map thead th { padding: 0; } .map td.none { background: none; }
.key { display: inline-block; margin: 8px 18px 0 0; font-size: 13px; } .key i { display: inline-block; width: 14px; height: 14px;
  margin-right: 6px; vertical-align: -2px; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 28px; }
.controls label { display: flex; align-items: center; gap: 8px; font-size: 14px; }
.controls input[type=range] { width: 200px; } .controls select { max-width: 260px; } #plot svg { width: 100%; max-width: 760px; }
#plot text { font-size: 12px; fill: var(--soft); } #plot circle { cursor: pointer; }
@media (max-width: 640px) { main { margin: 0; padding: 16px; border: 0; } .controls label { flex-wrap: wrap; } }
@media print { .controls, #best { display: none; } body { background: none; } main { border: 0; margin: 0; padding: 0; max-width: none; } }
"""

# Cividis-like steps, dark for few bits: an order that survives any colour vision and a grey printer.
_RAMP = ("#00224e", "#2a3f6d", "#575d6d", "#7c7b78", "#a59c74", "#d2c060", "#fee838")


def page(data: ReportData) -> str:
    """The whole page; every text that comes from outside is escaped."""
    body = [
        f"<h1>{escape(data.model)}</h1>",
        f'<p class="soft">{escape(data.target)} · {escape(data.objective.workload)} · study {escape(data.study)}</p>',
        _answer(data),
        _notes(data.notes),
        _section("Frontier", _frontier(data)),
        _section(_known_as(data.dense), _measured(data)),
        _section("Against the simple policies", f"<p>{escape(guard_words(data.guard))}</p>") if data.guard else "",
        _section("What was decided where", _map(data.layer_map, _look(data))),
        _section("What limits it", _limits(data)) if data.limits else "",
        _section("Study the trade-off", explorer(data, _look(data))),
        _section("Predicted, not measured", _predicted(data)) if data.predicted else "",
        _section("How far the models can be trusted", _errors(data)),
        _section("Data", _data(data)),
        _section("What the search cost", _pairs(data.cost)),
        _section("Provenance", _pairs(data.provenance)),
    ]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(data.model)}: report</title>'
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body><main>\n' + "\n".join(
        [part for part in body if part] + ["</main></body></html>\n"]
    )


def write_page(data: ReportData, path: Path) -> None:
    """Writes the page in one step."""
    write_text(path, page(data))


def _frontier(data: ReportData) -> str:
    """The picture, drawn for two widths, of which the browser takes the fitting one."""
    wide, narrow = (_inline(draw(data, "svg", narrow)) for narrow in (False, True))
    alt = f"Latency against KL divergence: {data.dense.fidelity.value} policies, and the solver's predicted curve"
    source = f'<source media="(max-width: 640px)" srcset="{narrow}">'
    return f'<picture>{source}<img width="806" alt="{escape(alt, quote=True)}" src="{wide}"></picture>'


def _inline(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _known_as(candidate: Candidate) -> str:
    if candidate.fidelity is Fidelity.MEASURED:
        return "Measured"
    return f"Quality evaluated, latency {candidate.latency_label}: nothing was timed on the target"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>"


def _answer(data: ReportData) -> str:
    verdict = {"met": "The objective is met", "not met": "The objective is not met", "unvalidated": "Not validated"}[
        data.verdict
    ]
    asked, *rest = answer(data)
    lines = "".join(f"<p>{escape(sentence)}</p>" for sentence in rest)
    name = data.verdict.replace(" ", "-")
    return f'<div class="answer {name}"><b class="verdict">{verdict}</b><p>{escape(asked)}</p>{lines}</div>'


def _notes(notes: Sequence[str]) -> str:
    return "".join(f'<p class="soft">Note: {escape(note)}</p>' for note in notes)


def _measured(data: ReportData) -> str:
    ordered = sorted(data.measured, key=lambda entry: (entry.candidate.latency_ms, entry.candidate.kl))
    note = f"Perplexity is not reported: {data.perplexity_note}." if data.perplexity_note else ""
    kinds = "Latency: median [95 % interval]. KL: mean over tokens, with its standard error over sequences, against the dense model."
    classes = [entry.group for entry in ordered]
    return f'<p class="soft">{kinds} {escape(note)}</p>' + _table(candidate_table(data.measured), classes)


def _predicted(data: ReportData) -> str:
    table = predicted_table(sorted(data.predicted, key=lambda c: c.latency_ms))
    text = "The exact solver's optima under other budgets: KL predicted by additive scores, latency modelled. Nobody has run these."
    return f'<div class="predicted"><p class="soft">{text}</p>{_table(table)}</div>'


def _table(table: Table, classes: Sequence[str] = ()) -> str:
    numeric = ["n" if table.is_numeric(column) else "" for column in table.columns]
    head = _cells("th", [column.heading for column in table.columns], numeric)
    rows = [_cells("td", row, numeric) for row in table.cells()]
    names = [*classes, *[""] * (len(rows) - len(classes))]
    body = "".join(f'<tr class="{name}">{row}</tr>' for name, row in zip(names, rows, strict=True))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(tag: str, texts: Iterable[str], classes: Iterable[str]) -> str:
    return "".join(f'<{tag} class="{name}">{escape(text)}</{tag}>' for text, name in zip(texts, classes, strict=True))


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in pairs)
    return f"<table>{rows}</table>"


def _data(data: ReportData) -> str:
    if not data.data:
        return "<p>No text was used.</p>"
    head = "<tr><th>role</th><th>source</th><th>tokens</th><th>hash</th></tr>"
    rows = [(use.role, use.source, f"{use.n_tokens:,}", use.digest) for use in data.data]
    return f"<table>{head}" + "".join(f"<tr>{_cells('td', row, ('', '', 'n', ''))}</tr>" for row in rows) + "</table>"


def _errors(data: ReportData) -> str:
    lines = [
        f"Latency map of {fit.workload}: {fit.formula}, fitted on {fit.n_runs} whole-model runs; leave-one-out error "
        f"{fit.mean_error:.1%} on average, {fit.max_error:.1%} at most; intervals promise {fit.coverage:.0%}. {fit.checked}".strip()
        for fit in data.latency_fits
    ] or ["No latency map was fitted."]
    report = data.predictor
    if report is None:
        lines.append("No loss predictor was evaluated: too few policies were measured.")
    else:
        lines.append(
            f"Loss predictor ({', '.join(sorted(set(report.kinds)))}), on {report.n} policies it never saw: rank correlation "
            f"{_correlation(report.spearman)} overall, {_correlation(report.spearman_in_bands)} inside ±3 % latency bands "
            f"({report.n_in_bands} policies); the raw score alone {_correlation(report.spearman_score)}; mean error of log KL "
            f"{report.mae_log:.2f}; {report.coverage:.0%} of true values inside intervals that promise {report.promised:.0%}."
        )
    text = "".join(f"<p>{escape(line)}</p>" for line in lines)
    if not (data.latency_pairs or data.loss_pairs):
        return text
    panels = [latency_panel(name, pairs) for name, pairs in data.latency_pairs.items()]
    panels += [loss_panel(data.loss_pairs)] if data.loss_pairs else []
    # One picture each: side by side where there is room, below each other where there is not.
    drawn = ((panel, _inline(draw_pairs([panel], "svg"))) for panel in panels if panel.pairs)
    pictures = (
        f'<img width="403" alt="{escape(f"{panel.known.capitalize()} against measured: {panel.title}", quote=True)}" src="{source}">'
        for panel, source in drawn
    )
    return f"{text}<p>{''.join(pictures)}</p>"


def _limits(data: ReportData) -> str:
    """Where the answer's loss and time sit, all predicted."""
    total = sum(share.ms for share in data.shares)
    time = [(share.what, f"{share.ms:.2f} ms", f"{share.ms / total:.0%}") for share in data.shares]
    sites = [
        (
            f"{limit.kind}, block {limit.block}",
            limit.format,
            f"{limit.loss:.2g}",
            _time(limit.ms),
            f"{limit.wider}: {limit.saved:.2g} nats for {_time(limit.more_ms)}" if limit.wider else "nothing wider helps",
        )
        for limit in data.limits
    ]
    text = "Losses predicted by sensitivity scores, times modelled by kernel times and the latency map: `search explain` measures them."
    return (
        f'<div class="predicted"><p class="soft">{escape(text)}</p>'
        + _plain_table(("a token's time", "modelled", "share"), time)
        + _plain_table(("the costliest layers", "format", "nats per token", "time", "what a wider format would buy"), sites)
        + "</div>"
    )


def _time(ms: float) -> str:
    """Milliseconds, or microseconds where they are less than one."""
    return f"{ms:.2f} ms" if ms >= 1 else f"{ms * 1e3:.0f} µs"


def _plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + _cells("td", row, [""] * len(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _correlation(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2f}"


def _look(data: ReportData) -> Look:
    """How the formats of the study look: the narrower, the darker."""
    policies = [*(entry.candidate.policy for entry in data.measured), *(candidate.policy for candidate in data.predicted)]
    maps = [data.map_of(policy) for policy in policies]
    names = sorted({name for layers in maps for row in layers.cells.values() for name in row.values()}, key=_bits)
    step = (len(_RAMP) - 1) / max(len(names) - 1, 1)
    colours = {name: _RAMP[round(place * step)] for place, name in enumerate(names)}

    def look(name: str) -> tuple[str, str, str]:
        background = colours[name]
        red, green, blue = (int(background[k : k + 2], 16) for k in (1, 3, 5))
        ink = "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else "#1f2430"
        return background, ink, f"{_bits(name)[0]:g}" if _bits(name)[0] < float("inf") else ""

    return look


def _map(layers: LayerMap, look: Look) -> str:
    """A grid of kinds by blocks; the colour and the number say how many bits a weight has, the tooltip names the format."""
    names = sorted({name for row in layers.cells.values() for name in row.values()}, key=_bits)
    head = "".join(f"<th>{block if block % 5 == 0 else ''}</th>" for block in range(layers.n_blocks))
    rows = "".join(
        f"<tr><th>{escape(kind)}</th>"
        + "".join(_cell(layers.cells[kind].get(b), b, look) for b in range(layers.n_blocks))
        + "</tr>"
        for kind in layers.kinds
    )
    counts = {name: sum(own == name for row in layers.cells.values() for own in row.values()) for name in names}
    keys = "".join(
        f'<span class="key"><i style="background:{look(name)[0]}"></i>{escape(name)} ({counts[name]})</span>' for name in names
    )
    grid = f'<table class="map"><thead><tr><th>block</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="scroll">{grid}</div><p>{keys}</p>'


def _cell(name: str | None, block: int, look: Look) -> str:
    if name is None:
        return '<td class="none"></td>'
    background, ink, bits = look(name)
    title = escape(f"block {block}: {name}", quote=True)
    return f'<td style="background:{background};color:{ink}" title="{title}">{bits}</td>'


def _bits(name: str) -> tuple[float, float, str]:
    """What formats are ordered by: bits, scales a weight; what is no format's name comes last."""
    try:
        form = parse_format(name)
    except ValueError:
        return float("inf"), 0.0, name
    return float(form.bits), 0.0 if form.group == -1 else 1 / form.group, name

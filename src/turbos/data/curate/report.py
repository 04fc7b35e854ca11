"""The report of a curation: one HTML page that needs nothing else, and a PNG of the funnel.

Texts of the corpus are shown as text (escaped), never as markup. Both files are drawn from `Counts` alone, so they can
be made again from `curation.json`.

    write_report(counts, Path("clean"), ["english", "pages.jsonl"])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from turbos.data.curate.counts import Counts, DropSample, SourceCounts, StageCounts

PAGE_FILE, FUNNEL_FILE = "report.html", "funnel.png"
MOST_LABELS = 12

STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dde3ea; --paper: #ffffff; --panel: #f5f7fa; --kept: #2f6fb0;
  --gone: #d9822b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa6b5; --line: #2f3947; --paper: #12171f;
  --panel: #1a212c; --kept: #5b9bd8; --gone: #e39a4f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 10px; }
p { margin: 6px 0; } .soft { color: var(--soft); }
.figures { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 8px; }
.figure { background: var(--panel); border-radius: 8px; padding: 12px 18px; min-width: 150px; }
.figure b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: middle;
  white-space: nowrap; }
th { font-weight: 600; color: var(--soft); font-size: 13px; }
th:first-child, td:first-child { text-align: left; } td.wide { width: 30%; min-width: 110px; }
td.why { text-align: left; } tr.out td { color: var(--soft); }
.bar { display: flex; height: 14px; border-radius: 3px; overflow: hidden; background: var(--panel); }
.bar i { background: var(--kept); } .bar u { background: var(--gone); min-width: 0; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 6px 0 14px; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 32px; }
@media (max-width: 720px) { .two { display: block; } }
details { border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; margin: 8px 0; }
summary { cursor: pointer; } summary b { margin-right: 8px; } ul { margin: 8px 0; padding-left: 20px; }
pre { background: var(--panel); border-radius: 6px; padding: 10px 12px; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: 4px 0 12px; font: 13px/1.45 ui-monospace, monospace; max-height: 220px; overflow: auto; }
"""


def write_report(counts: Counts, folder: Path, names: Sequence[str], notes: Sequence[str] = ()) -> Path:
    """Write page and funnel into a folder; returns the page's path. `notes` are lines below the title."""
    draw_funnel(counts, folder / FUNNEL_FILE)
    page = folder / PAGE_FILE
    page.write_text(render_page(counts, names, notes), encoding="utf-8")
    return page


def render_page(counts: Counts, names: Sequence[str], notes: Sequence[str] = ()) -> str:
    """The page as HTML."""
    total = counts.total
    title = f"Curation of {', '.join(names[:4])}{' and more' if len(names) > 4 else ''}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="soft">{escape(note)}</p>' for note in notes),
        _figures(counts),
        "<h2>Stage by stage</h2>",
        _stages_table(counts.stages, max(total.bytes_in, 1)),
        "<h2>By source</h2>",
        _sources_table(counts.sources),
        '<div class="two">',
        _labels_table("Languages of what came out", counts.languages),
        _labels_table("Topics of what came out", counts.topics),
        "</div>",
        "<h2>What was dropped or cut, and why</h2>",
        *(_drops(stage) for stage in counts.stages if stage.samples or stage.reasons),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    whole = f"<head>{head}<style>{STYLE}</style></head><body><main>\n{body}\n</main></body>"
    return f'<!doctype html>\n<html lang="en">{whole}</html>\n'


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _figures(counts: Counts) -> str:
    total = counts.total
    seconds = sum(stage.seconds for stage in counts.stages)
    figures = (
        (f"{total.documents_in:,}", f"documents in, {_megabytes(total.bytes_in)}"),
        (f"{total.documents_out:,}", f"documents out, {_megabytes(total.bytes_out)}"),
        (_share(total.bytes_out, total.bytes_in), "of the bytes kept"),
        (f"{total.bytes_in / 1e6 / max(seconds, 1e-9):.1f} MB/s", "a core, all stages"),
    )
    cells = (f'<div class="figure"><b>{escape(figure)}</b>{escape(words)}</div>' for figure, words in figures)
    return f'<div class="figures">{"".join(cells)}</div>'


def _bar(kept: float, gone: float, whole: float) -> str:
    parts = f'<i style="width:{100 * kept / whole:.2f}%"></i><u style="width:{100 * gone / whole:.2f}%"></u>'
    return f'<div class="bar">{parts}</div>'


def _row(cells: Iterable[str], kind: str = "td") -> str:
    return "<tr>" + "".join(f"<{kind}>{cell}</{kind}>" for cell in cells) + "</tr>"


def _row_with_bar(cells: Iterable[str], bar: str) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + f'<td class="wide">{bar}</td></tr>'


def _stages_table(stages: Sequence[StageCounts], whole: int) -> str:
    rows = [_row(("stage", "documents in", "dropped", "edited", "kept of all bytes", "MB/s", ""), "th")]
    for stage in stages:
        if stage.skipped:
            why = f'<td colspan="6" class="why">left out: {escape(stage.skipped)}</td>'
            rows.append(f'<tr class="out"><td>{escape(stage.title)}</td>{why}</tr>')
            continue
        speed = f"{stage.bytes_in / 1e6 / stage.seconds:,.0f}" if stage.seconds > 0.01 else ""
        bar = _bar(stage.bytes_out, stage.bytes_in - stage.bytes_out, whole)
        cells = (escape(stage.title), f"{stage.documents_in:,}", f"{stage.dropped:,}", f"{stage.edited:,}",
                 _share(stage.bytes_out, whole), speed)  # fmt: skip
        rows.append(_row_with_bar(cells, bar))
    signs = (("kept", "kept"), ("gone", "taken by the stage"))
    key = "".join(f'<i style="background:var(--{color})"></i>{words}' for color, words in signs)
    return f'<table>{"".join(rows)}</table><p class="soft key">{key}</p>'


def _sources_table(sources: Mapping[str, SourceCounts]) -> str:
    rows = [_row(("source", "documents in", "documents out", "text in", "text out", "kept"), "th")]
    for name, one in sources.items():
        rows.append(
            _row(
                (
                    escape(name), f"{one.documents_in:,}", f"{one.documents_out:,}", _megabytes(one.bytes_in),
                    _megabytes(one.bytes_out), _share(one.bytes_out, one.bytes_in),
                )
            )
        )  # fmt: skip
    return f"<table>{''.join(rows)}</table>"


def _labels_table(title: str, labels: Mapping[str, int]) -> str:
    if not labels:
        return ""
    ordered = sorted(labels.items(), key=lambda item: -item[1])
    whole = sum(labels.values())
    rows = [_row_with_bar((escape(name), f"{count:,}", _share(count, whole)), _bar(count, 0, ordered[0][1]))
            for name, count in ordered[:MOST_LABELS]]  # fmt: skip
    more = len(ordered) - MOST_LABELS
    rest = f'<p class="soft">and {more} more</p>' if more > 0 else ""
    return f"<div><h2>{escape(title)}</h2><table>{''.join(rows)}</table>{rest}</div>"


def _drops(stage: StageCounts) -> str:
    reasons = sorted(stage.reasons.items(), key=lambda item: -item[1])
    items = "".join(f"<li>{escape(reason)}: {count:,}</li>" for reason, count in reasons)
    ordered = sorted(stage.samples, key=lambda one: (-stage.reasons.get(one.reason, 0), one.reason, one.number))
    edited = f", {stage.edited:,} edited" if stage.edited else ""
    return (
        f"<details><summary><b>{escape(stage.title)}</b><span class='soft'>{stage.dropped:,} dropped{edited}"
        f"</span></summary><ul>{items}</ul>{''.join(map(_sample, ordered))}</details>"
    )


def _sample(one: DropSample) -> str:
    detail = f" ({one.detail})" if one.detail else ""
    head = f"{one.reason}{detail} - document {one.number} of {one.source}"
    return f'<p class="soft">{escape(head)}</p><pre>{escape(one.text)}</pre>'


def draw_funnel(counts: Counts, path: Path) -> Path:
    """Write a PNG: the share of all bytes that is left after each stage; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = [stage for stage in counts.stages if not stage.skipped]
    whole = max(counts.total.bytes_in, 1)
    figure, axes = pyplot.subplots(figsize=(8.0, 0.42 * len(stages) + 1.2), layout="constrained")
    left = [100 * stage.bytes_out / whole for stage in stages]
    gone = [100 * (stage.bytes_in - stage.bytes_out) / whole for stage in stages]
    places = range(len(stages))
    axes.barh(places, left, color="#2f6fb0", label="kept")
    axes.barh(places, gone, left=left, color="#d9822b", label="taken by the stage")
    for place, stage, share in zip(places, stages, left, strict=True):
        dropped = f"  {share:.1f} %" + (f", {stage.dropped:,} dropped" if stage.dropped else "")
        axes.annotate(dropped, (100, place), va="center", fontsize=8, annotation_clip=False)
    axes.set_yticks(list(places), [stage.title for stage in stages])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"share of {_megabytes(whole)} of text, in percent", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path

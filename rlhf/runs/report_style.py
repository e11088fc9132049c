"""Colours and style sheet of the report."""

from __future__ import annotations

BEFORE, AFTER, BEST = "#94a3b8", "#2563eb", "#d97706"
"""Colours of the starting model, the trained model and the best-of-n baseline, the same in every chart."""

INK, QUIET, GRID = "#0f172a", "#64748b", "#e2e8f0"

STYLE = """
:root { color-scheme: light; --ink: #0f172a; --quiet: #64748b; --line: #e2e8f0; --card: #ffffff; --page: #f6f8fb;
  --blue: #2563eb; --good: #15803d; --bad: #b91c1c; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; margin: 0; letter-spacing: -0.02em; }
h2 { font-size: 18px; margin: 40px 0 12px; letter-spacing: -0.01em; }
h3 { font-size: 14px; margin: 20px 0 8px; color: var(--quiet); font-weight: 600; }
p { margin: 4px 0 12px; }
.quiet { color: var(--quiet); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 24px 0 12px; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 23px; white-space: nowrap; letter-spacing: -0.02em; line-height: 1.25; }
.tile span { color: var(--quiet); font-size: 13px; }
.card { padding: 16px; overflow-x: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 12px; }
.charts .card { padding: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: var(--quiet); font-weight: 600; font-size: 13px; }
th, td { padding: 7px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { color: var(--quiet); }
td.text { min-width: 240px; white-space: pre-wrap; overflow-wrap: anywhere; }
.badge { display: inline-block; border-radius: 999px; padding: 2px 10px; margin: 0 6px 6px 0; font-size: 13px; }
.met { background: #dcfce7; color: var(--good); }
.unmet { background: #fee2e2; color: var(--bad); }
.tag { background: #eef2ff; color: #3730a3; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--quiet); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12.5px; }
@media print { body { background: #fff; } .card, .tile { break-inside: avoid; } }
"""

"""The style sheet of the report page: light or dark as the reader's system is, and no web fonts."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1d2126; --soft: #5c636b; --line: #e1e4e8; --page: #f6f7f9; --card: #ffffff;
  --own: 0, 114, 178; --win: #00745a; --lose: #b84300;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa1a9; --line: #30353b; --page: #0e1013; --card: #16181b;
    --own: 86, 180, 233; --win: #4cc9a6; --lose: #f08a4b; }
  img { filter: invert(0.912) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 4px; }
h3 { font-size: 12.5px; font-weight: 500; color: var(--soft); margin: 0; }
p { margin: 0 0 12px; }
.kind { margin: 0 0 4px; color: var(--soft); font-size: 13px; letter-spacing: 0.04em; }
.facts { color: var(--soft); margin: 6px 0 20px; }
.reading { font-size: 18px; line-height: 1.5; border-left: 3px solid rgb(var(--own)); padding: 2px 0 2px 16px;
  margin: 0 0 24px; }
section, main > details { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 22px; margin: 0 0 18px; }
section > p { color: var(--soft); max-width: 76ch; }
img { display: block; width: 100%; height: auto; }
.tiles { display: flex; flex-wrap: wrap; padding: 0; overflow: hidden; }
.tile { flex: 1 1 112px; padding: 14px 16px; box-shadow: 1px 1px 0 0 var(--line); }
.tile p { font-size: 24px; font-weight: 600; line-height: 1.25; margin: 4px 0 0;
  font-variant-numeric: tabular-nums; }
.tile .was { font-size: 12.5px; font-weight: 400; color: var(--soft); margin: 2px 0 0; }
summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
pre { overflow-x: auto; margin: 12px 0 0;
  font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
.group { border-top: 1px solid var(--line); padding: 14px 0 2px; margin-top: 8px; }
.prompt { color: var(--soft); white-space: pre-wrap; overflow-wrap: anywhere; }
.row { padding: 10px 0 4px 14px; border-left: 2px solid var(--line); margin: 0 0 12px; }
.response { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0; }
.chips { display: flex; flex-wrap: wrap; gap: 5px 12px; font-size: 12.5px; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.chip b { color: var(--ink); font-weight: 600; }
.chip.part { padding: 0 7px; border: 1px solid var(--line); border-radius: 9px; }
.badge { font-weight: 600; padding: 0 8px; border-radius: 9px; border: 1px solid currentColor; }
.badge.winner { color: var(--win); }
.badge.loser, .badge.truncated { color: var(--lose); }
.tokens { font-size: 13px; line-height: 1.9; margin: 4px 0; overflow-wrap: anywhere; }
.tokens span { border-radius: 3px; padding: 1px 3px; margin: 0 1px; white-space: pre-wrap; }
.more { font-size: 12.5px; color: var(--soft); }
.more summary { font-weight: 400; }
table { border-collapse: collapse; width: 100%; margin-top: 8px; }
th, td { text-align: left; vertical-align: top; padding: 5px 12px 5px 0; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 500; width: 110px; }
.wide { overflow-x: auto; }
.numbers th, .numbers td { text-align: right; width: auto; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.numbers th:first-child, .numbers td:first-child { text-align: left; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""

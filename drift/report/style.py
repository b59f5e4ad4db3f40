"""A report's style sheet: light, dark and paper from one set of variables; one column on a phone, two on a desk."""

_LEVELS = "\n".join(
    f".h{level} {{ background: color-mix(in srgb, var(--heat) {7.5 * level:g}%, transparent); }}" for level in range(11)
)  # the darkest leaves the ink legible

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f6f7f9; --ink: #1b1f24; --muted: #59636e; --line: #dde2e8;
  --base: #8b949e; --uniform: #0072b2; --success: #00916b; --drift: #d1490c; --other: #8250df;
  --drift-wash: #fdf1ea; --good: #0f7b4f; --bad: #b42318; --note: #fff8e0; --note-line: #e4cc7a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #101418; --panel: #181d23; --ink: #e8ecf0; --muted: #9aa5b1; --line: #2c343d;
    --base: #8590a0; --uniform: #55a9e0; --success: #35bd92; --drift: #f5854a; --other: #b48cf2;
    --drift-wash: #2a1d15; --good: #4cc38a; --bad: #f2776b; --note: #2a2515; --note-line: #6d5d25;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; margin: .1rem 0 .6rem; letter-spacing: -.02em; }
h2 { font-size: 1.3rem; margin: 3.2rem 0 .35rem; letter-spacing: -.01em; }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .3rem; }
p { margin: .5rem 0; max-width: 46rem; }
.eyebrow { color: var(--drift); font-weight: 650; font-size: .82rem; letter-spacing: .06em; margin: 0; }
.lede { font-size: 1.16rem; line-height: 1.5; }
.lede b { color: var(--drift); font-weight: 650; }
.muted, small, .why { color: var(--muted); }
.why { font-size: .94rem; }
small { font-size: .82rem; }
code, pre, .id { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.notice {
  background: var(--note); border: 1px solid var(--note-line); border-radius: 10px;
  padding: .7rem 1rem; margin: 1.2rem 0; font-size: .94rem;
}
.notice ul { margin: .3rem 0 0; padding-left: 1.2rem; }

.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: .75rem; margin: 1.2rem 0; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; padding: .75rem .95rem .8rem; }
.tile span { display: block; color: var(--muted); font-size: .84rem; line-height: 1.35; }
.tile strong { display: block; font-size: 1.55rem; line-height: 1.3; font-weight: 650; letter-spacing: -.015em; }
.tile.key { border-color: var(--drift); }
.tile.key strong { color: var(--drift); }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .97rem; }
th { text-align: right; font-weight: 600; color: var(--muted); font-size: .84rem; vertical-align: bottom; }
td { text-align: right; }
th, td { padding: .55rem .8rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; }
th:last-child, td:last-child { padding-right: .2rem; }
td small, th small { display: block; line-height: 1.35; margin-top: .2rem; font-weight: 400; }
td + td small { white-space: nowrap; }
tr.key td { font-weight: 650; }
tr.key small { font-weight: 400; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
.arm { white-space: nowrap; }
.bar { display: block; height: 5px; border-radius: 3px; background: var(--line); margin-top: .25rem; min-width: 4rem; }
.bar i { display: block; height: 100%; border-radius: 3px; }
.good { color: var(--good); } .bad { color: var(--bad); }

.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr));
  gap: 1.1rem; margin: 1.2rem 0;
}
figure {
  margin: 0; background: var(--panel); border: 1px solid var(--line); border-radius: 12px; padding: .5rem .6rem;
}
figure svg { display: block; width: 100%; height: auto; max-width: 34rem; margin: 0 auto; }
figure svg text { font-family: inherit !important; }
figcaption { color: var(--muted); font-size: .86rem; line-height: 1.4; padding: .2rem .4rem .3rem; }

.stages { display: flex; height: 1.5rem; border-radius: 8px; overflow: hidden; margin: 1rem 0 .6rem; gap: 2px; }
.stages i { min-width: 2px; }
.legend {
  display: flex; flex-wrap: wrap; gap: .35rem 1.3rem; list-style: none; margin: 0; padding: 0; font-size: .93rem;
}

.trajectory {
  border: 1px solid var(--line); border-radius: 12px; margin: 1rem 0; overflow: hidden; background: var(--panel);
}
.trajectory header {
  display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; align-items: baseline; padding: .6rem 1rem;
  border-bottom: 1px solid var(--line); font-size: .94rem;
}
.trajectory header b { font-weight: 650; }
.id { font-size: .82rem; color: var(--muted); overflow-wrap: anywhere; }
.turn { display: grid; grid-template-columns: 10.5rem minmax(0, 1fr); gap: .1rem .9rem; padding: .38rem 1rem; }
.turn + .turn { border-top: 1px solid var(--line); }
.turn > div:first-child {
  display: flex; flex-wrap: wrap; gap: 0 .7rem; align-content: flex-start;
  color: var(--muted); font-size: .84rem; line-height: 1.45; padding-top: .1rem;
}
.turn pre {
  margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .88rem; line-height: 1.5; unicode-bidi: isolate;
}
.turn.assistant { background: var(--paper); }
.turn.trained { background: var(--drift-wash); box-shadow: inset 4px 0 0 var(--drift); }
.tag { color: var(--drift); font-weight: 650; }
.wrong { color: var(--bad); } .right { color: var(--good); } .unparsed { color: var(--muted); font-style: italic; }

.heat i { font-style: normal; border-radius: 2px; cursor: help; }
.heat { line-height: 1.7 !important; }
.heat.gate, .scale.gate { --heat: var(--drift); } .heat.bonus, .scale.bonus { --heat: var(--other); }
.heat.entropy, .scale.entropy { --heat: var(--uniform); } .heat.divergence, .scale.divergence { --heat: var(--success); }
.gap { display: block; color: var(--muted); font-size: .78rem; line-height: 1.35; opacity: .85; }
.scale { display: inline-flex; vertical-align: middle; margin: 0 .4em; border-radius: 3px; overflow: hidden; }
.scale { border: 1px solid var(--line); }
.scale i { width: .8em; height: .9em; }
@levels
.trajectory details { margin: 0; padding: .2rem 0 .3rem; border-top: 1px solid var(--line); }
.trajectory summary { padding: .2rem 1rem; font-size: .84rem; }

details { margin: .9rem 0; }
summary { cursor: pointer; color: var(--muted); font-size: .94rem; padding: .2rem 0; }
details pre.yaml {
  background: var(--panel); border: 1px solid var(--line); border-radius: 12px;
  padding: 1rem; overflow-x: auto; font-size: .84rem; line-height: 1.5; margin: .4rem 0;
}
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 0 2rem; margin: .8rem 0; }
.facts div {
  display: flex; justify-content: space-between; gap: 1rem;
  border-bottom: 1px solid var(--line); padding: .35rem 0; font-size: .93rem;
}
.facts dt { color: var(--muted); } .facts dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
footer {
  margin-top: 3.5rem; color: var(--muted); font-size: .86rem; border-top: 1px solid var(--line); padding-top: .8rem;
}
@media (max-width: 36rem) {
  main { padding: 1.4rem .9rem 3rem; }
  th, td { padding: .5rem .28rem; }
  table { font-size: .82rem; }
  th { font-size: .76rem; }
  td small, th small { font-size: .7rem; }
  .bar { min-width: 2rem; }
  .dot { margin-right: .3em; width: .6em; height: .6em; }
  .tiles { grid-template-columns: 1fr 1fr; gap: .6rem; }
  .tile strong { font-size: 1.3rem; }
  .turn { grid-template-columns: minmax(0, 1fr); }
}
@media print {
  :root {
    --paper: #fff; --panel: #fff; --ink: #000; --muted: #444; --line: #ccc; --base: #777; --uniform: #0072b2;
    --success: #00805d; --drift: #c2410c; --drift-wash: #fff; --good: #0a5c3a; --bad: #9b1c12; --note: #fff;
  }
  body { font-size: 10pt; }
  .figures { grid-template-columns: 1fr 1fr; gap: .6rem; }
  main { max-width: none; padding: 0; }
  figure, .tile, .turn, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
""".replace("@levels", _LEVELS)

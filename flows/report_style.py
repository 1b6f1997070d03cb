"""The looks of the report: one style sheet, light and dark."""

STYLE = """
:root { color-scheme: light dark;
  --page:#fbfbf9; --card:#ffffff; --ink:#1c1e21; --soft:#62666d; --line:#e4e4df; --wash:#f2f2ee;
  --accent:#2b5fb8; --other:#c07a1c; --faint:#b9c9e4; --good:#2d7a46; --bad:#b3372f; }
@media (prefers-color-scheme: dark) { :root {
  --page:#131416; --card:#1a1c1f; --ink:#e7e7e4; --soft:#989ca3; --line:#2d3034; --wash:#212428;
  --accent:#82aaf2; --other:#e0a458; --faint:#3b4d6e; --good:#74c08b; --bad:#ee8078; } }
* { box-sizing:border-box; }
html { scroll-behavior:smooth; }
body { margin:0; background:var(--page); color:var(--ink); -webkit-text-size-adjust:100%;
  font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
main { max-width:1080px; margin:0 auto; padding:44px 28px 72px; }
h1 { font-size:30px; line-height:1.2; letter-spacing:-.015em; font-weight:640; margin:2px 0 8px;
  overflow-wrap:anywhere; }
h2 { font-size:20px; letter-spacing:-.01em; font-weight:620; margin:60px 0 4px; padding-top:20px;
  border-top:1px solid var(--line); }
h3 { font-size:14px; font-weight:620; margin:0 0 8px; }
p { margin:6px 0 14px; max-width:74ch; } .soft { color:var(--soft); } .small { font-size:13px; }
a { color:var(--accent); text-decoration:none; } a:hover { text-decoration:underline; }
.eyebrow { color:var(--soft); font-size:13px; letter-spacing:.02em; }
nav { display:flex; flex-wrap:wrap; gap:4px 20px; margin-top:22px; font-size:14px; }
code,.mono { font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace; font-size:.86em; }
.badge { display:inline-block; padding:1px 10px; border-radius:99px; font-size:13px; font-weight:600;
  border:1px solid currentColor; white-space:nowrap; }
.good { color:var(--good); } .bad { color:var(--bad); }
.note { border-left:3px solid var(--bad); background:var(--wash); padding:8px 14px; border-radius:0 6px 6px 0;
  margin-top:16px; }
.tiles { display:grid; grid-template-columns:repeat(auto-fill,minmax(176px,1fr)); gap:12px; margin:26px 0 0; }
.card p { font-size:13px; margin:8px 0 0; }
.tile,.card { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px 16px;
  min-width:0; }
.tile b { display:block; font-size:25px; line-height:1.25; font-weight:620; letter-spacing:-.02em;
  font-variant-numeric:tabular-nums; }
.tile span { color:var(--soft); font-size:13px; } .tile small { display:block; color:var(--soft); font-size:12.5px; }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr)); gap:14px; margin:16px 0; }
.two { grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr)); }
.legend { display:flex; flex-wrap:wrap; gap:2px 16px; color:var(--soft); font-size:12.5px; margin-top:4px; }
.legend i { display:inline-block; width:11px; height:11px; border-radius:3px; margin-right:6px; vertical-align:-1px; }
.legend .strong { background:var(--accent); } .legend .faint { background:var(--faint); }
.legend .other { background:var(--other); }
.images { display:grid; grid-template-columns:repeat(auto-fill,minmax(108px,1fr)); gap:18px 14px; margin:18px 0; }
figure { margin:0; } figure img { display:block; width:100%; aspect-ratio:1; object-fit:contain; border-radius:7px;
  background:var(--wash); border:1px solid var(--line); }
.grid { display:block; width:100%; border-radius:5px; } .pixels { image-rendering:pixelated; }
figcaption { font-size:12.5px; line-height:1.4; margin-top:7px; overflow-wrap:anywhere; }
figcaption .seen { display:block; color:var(--soft); } figcaption .seen b { color:var(--bad); font-weight:600; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-size:14px; margin:12px 0; font-variant-numeric:tabular-nums; }
th { text-align:left; font-weight:600; color:var(--soft); font-size:12.5px; padding:6px 14px 6px 0; white-space:nowrap;
  border-bottom:1px solid var(--line); }
td { padding:7px 14px 7px 0; border-bottom:1px solid var(--line); vertical-align:top; }
tr:last-child td { border-bottom:0; } .num { text-align:right; white-space:nowrap; padding-right:24px; }
td small { display:block; color:var(--soft); font-size:12.5px; }
.track { display:block; height:9px; border-radius:3px; background:var(--wash); overflow:hidden; margin-top:7px;
  min-width:90px; }
.track i { display:block; height:100%; background:var(--accent); border-radius:3px; }
.reasons { color:var(--soft); font-size:13px; } .reasons span { white-space:nowrap; margin-right:12px; }
details { border-top:1px solid var(--line); padding:8px 0; }
details:last-of-type { border-bottom:1px solid var(--line); }
summary { cursor:pointer; font-weight:600; font-size:14px; }
pre { overflow-x:auto; font-size:12.5px; line-height:1.5; background:var(--wash); border-radius:7px;
  padding:12px 14px; }
footer { margin-top:56px; color:var(--soft); font-size:13px; }
svg { display:block; width:100%; height:auto; overflow:visible; }
svg text { font-family:inherit; fill:var(--soft); font-size:11px; }
svg .value.other { fill:var(--other); } svg .value.strong { fill:var(--accent); font-weight:600; }
svg .name,svg .value { font-size:13px; } svg .name { fill:var(--ink); }
svg .mark { fill:var(--ink); font-size:12px; font-weight:600; }
svg .grid { stroke:var(--line); } svg .base { stroke:var(--soft); stroke-opacity:.55; }
svg .rule { stroke:var(--other); stroke-width:1.5; stroke-dasharray:4 3; }
svg .line { fill:none; stroke:var(--accent); stroke-width:2; stroke-linejoin:round; stroke-linecap:round; }
svg .line.faint { stroke:var(--faint); stroke-width:1.2; } svg .line.other { stroke:var(--other); }
svg .dot { fill:var(--accent); } svg .dot.faint { fill:var(--faint); } svg .dot.other { fill:var(--other); }
svg .bar { fill:var(--accent); } svg .bar.faint { fill:var(--faint); }
svg .interval line { stroke:var(--accent); stroke-width:2.5; stroke-linecap:round; stroke-opacity:.55; }
svg .interval circle { fill:var(--accent); } svg .interval.other line { stroke:var(--other); }
svg .interval.other circle { fill:var(--other); }
@media (max-width:600px) { main { padding:26px 16px 48px; } h1 { font-size:25px; } }
@media print { body { background:#fff; } .card,.tile,figure { break-inside:avoid; } nav { display:none; } }
"""

# For a drawing that stands alone: the colours, and what is said of drawings.
DRAWING_STYLE = "svg { background:var(--page); font-family:sans-serif; }\n" + "\n".join(
    line for line in STYLE.splitlines() if line.startswith((":root", "  --", "@media (prefers", "svg "))
)

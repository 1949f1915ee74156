"""The report's style sheet: light and dark by the reader's own setting, and fit for paper."""

CSS = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#16191d;--soft:#5b6470;--line:#e2e6eb;--accent:#0b6bcb;--good:#0f7b4f;
--bad:#c0342b;--open:#9a6700;--base:#8b95a1;--goodbg:#e3f5ec;--badbg:#fdeae8;--openbg:#fff3d6}
@media (prefers-color-scheme:dark){:root{--bg:#0f1216;--card:#171b21;--ink:#e8ebef;--soft:#9aa5b1;--line:#2a313a;
--accent:#6db3ff;--good:#4cc38a;--bad:#ff8a80;--open:#e3b341;--base:#6c7683;--goodbg:#12301f;--badbg:#3a1a18;
--openbg:#33270a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1100px;margin:0 auto;padding:32px 20px 64px}
header,section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:24px 28px;margin:0 0 20px}
h1{font-size:34px;line-height:1.15;margin:2px 0 10px;letter-spacing:-.02em}
h2{font-size:19px;margin:0 0 14px;letter-spacing:-.01em}
h3{font-size:15px;margin:22px 0 6px}
.kicker{margin:0;color:var(--soft);font-weight:600}
.reason{max-width:78ch;margin:0;color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(116px,1fr));gap:16px;margin:22px 0 0}
.tiles dt{color:var(--soft);font-size:13px;line-height:1.3}
.tiles div{display:flex;flex-direction:column;justify-content:space-between}
.tiles dd{margin:2px 0 0;font-size:22px;font-weight:650;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
.chip{display:inline-block;vertical-align:middle;font-size:12px;font-weight:650;line-height:1;padding:4px 8px;
border-radius:99px;letter-spacing:0;background:var(--openbg);color:var(--open)}
.chip.pass{background:var(--goodbg);color:var(--good)}.chip.fail{background:var(--badbg);color:var(--bad)}
.scroll{overflow-x:auto;margin:0 0 22px}.scroll:last-child{margin-bottom:0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);font-size:13px;padding:0 0 6px}
th,td{padding:7px 12px;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
thead th,thead td{border-top:0;font-weight:600;vertical-align:bottom}
th[scope=row]{text-align:left;font-weight:400;padding-left:0;position:sticky;left:0;background:var(--card)}
thead .chosen{border-bottom:3px solid var(--accent)}
.shade{background:color-mix(in srgb,var(--accent) calc(var(--v)*34%),transparent)}
code{background:var(--bg);border-radius:5px;padding:1px 5px;font-size:.92em;overflow-wrap:anywhere}
ul{margin:0;padding-left:20px}li{margin:4px 0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(380px,1fr));gap:24px 32px}
figure{margin:0}figcaption{color:var(--soft);font-size:13px;margin:0 0 8px}
.key{margin:10px 0 0;color:var(--soft);font-size:13px}
svg{width:100%;height:auto;display:block;font:12px system-ui,sans-serif;fill:var(--ink)}
.tick,.note{fill:var(--soft);font-size:11px}.name{fill:var(--soft)}.strong{font-weight:700}
.grid{stroke:var(--line)}.axis{stroke:var(--soft)}
.limit{stroke:var(--bad);stroke-dasharray:5 4}.note{fill:var(--bad)}
.ring{fill:none;stroke:var(--accent);stroke-width:2}
circle.pass,rect.pass{fill:var(--good)}rect.base,circle.base{fill:var(--base)}
circle.fail,rect.fail{fill:var(--card);stroke:var(--bad);stroke-width:2}
circle.undecided,rect.undecided{fill:var(--card);stroke:var(--open);stroke-width:2;stroke-dasharray:3 2}
.span{stroke-width:3;opacity:.45}.span.pass{stroke:var(--good)}.span.fail{stroke:var(--bad)}
.span.undecided{stroke:var(--open)}.span.base{stroke:var(--base)}
.line{fill:none;stroke-width:2.5}.line.s0{stroke:var(--base)}.line.s1{stroke:var(--accent)}
circle.s0{fill:var(--base)}circle.s1{fill:var(--accent)}.t0{fill:var(--soft)}.t1{fill:var(--accent);font-weight:600}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:5px 20px;margin:0;font-size:13.5px}
.facts dt{color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
pre{overflow-x:auto;font-size:12.5px;background:var(--bg);border-radius:8px;padding:14px}
summary{cursor:pointer}
@media (max-width:640px){th[scope=row]{max-width:42vw;white-space:normal}th,td{padding:7px 9px}header,section{padding:18px 16px}.charts{grid-template-columns:1fr}h1{font-size:28px}
.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:8px}}
@media print{body{background:#fff;font-size:11px}main{max-width:none;padding:0}
header,section{border:0;border-radius:0;padding:10px 0;break-inside:avoid-page}
.scroll{overflow:visible}th,td{padding:4px 6px}*{print-color-adjust:exact}}
"""

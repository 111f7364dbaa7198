"""HTML and SVG from nested calls: whatever comes from data is escaped, because only `Markup` is taken as it is."""

from __future__ import annotations

from html import escape

VOID = ("br", "meta")

# Colours are variables, so that a chart follows light and dark. Series: Okabe & Ito's palette, told apart by
# colour-blind readers, darkened for a light ground and lightened for a dark one.
STYLE = """
:root { color-scheme: light dark;
  --page: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d8dee4; --band: #f4f6f8; --good: #0b6e4f; --bad: #b3391b;
  --s0: #0068a8; --s1: #cf5400; --s2: #00845f; --s3: #b3508f;
  --s4: #8a6d00; --s5: #2f93c8; --s6: #5b4bb5; --s7: #6b7280; }
@media (prefers-color-scheme: dark) { :root {
  --page: #101418; --ink: #e6e9ec; --soft: #9aa5b1; --line: #333c45; --band: #1a2027; --good: #4fd1a5; --bad: #ff9a76;
  --s0: #5eb4ea; --s1: #ff944d; --s2: #35cfa0; --s3: #e694c6;
  --s4: #e6c34a; --s5: #a5d8f3; --s6: #a99bf5; --s7: #a8b0b8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 70rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .4rem; }
p { max-width: 46rem; margin: .4rem 0; }
.soft, .note { color: var(--soft); font-size: .9rem; }
.note { border-left: 4px solid var(--line); padding-left: .8rem; }
.lead { background: var(--band); border-left: 4px solid var(--s0); padding: .8rem 1.1rem; margin: 1.2rem 0; }
.lead ul { margin: 0; padding-left: 1.1rem; }
.lead li { margin: .25rem 0; }
.better { color: var(--good); font-weight: 600; }
.worse { color: var(--bad); font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .3rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: middle; }
th { font-weight: 600; vertical-align: bottom; }
tr.first td { border-top: 2px solid var(--soft); }
td.number, td span { white-space: nowrap; }
.left { text-align: left; }
details { margin: .6rem 0; }
summary { cursor: pointer; }
pre { background: var(--band); padding: .8rem; overflow-x: auto; font-size: .8rem; overflow-wrap: normal; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1.2rem 1.6rem; }
figure { margin: 0; }
figcaption { font-weight: 600; font-size: .92rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .85rem; margin: .4rem 0; padding: 0; }
.legend li { list-style: none; }
.legend svg { width: 34px; height: 12px; margin-right: .35rem; vertical-align: -1px; }
figure > svg { display: block; width: 100%; max-width: 25rem; height: auto; }
td svg, th svg { display: block; width: 104px; }
svg text { font-size: 11px; fill: var(--soft); }
svg .strong { fill: var(--ink); }
svg .rule { stroke: var(--line); }
svg .axis { stroke: var(--soft); }
svg .faint { opacity: .35; }
@media (max-width: 1000px) { /* a table's rows become cards */
  thead { display: none; }
  table, tbody, tr { display: block; }
  tr, tr.first { border-top: 1px solid var(--line); padding: .5rem 0; }
  tr td, tr.first td { border: 0; }
  td { padding: .1rem 0; text-align: left; display: grid; gap: .6rem; grid-template-columns: 8.5rem 1fr; }
  td.key, td.number { display: inline-flex; gap: .4rem; margin-right: 1rem; }
  td.key { font-weight: 600; }
  td::before { content: attr(data-label); color: var(--soft); font-weight: 400; }
  td:empty { display: none; }
}
"""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *content: object, **attributes: object) -> Markup:
    """An element.

    Args:
        content: `Markup` as it is; lists and tuples piece by piece; None left out; anything else as escaped text.
        attributes: `cls` is the class, `_` becomes `-`; None and False are left out; floats get one decimal.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        shown = "" if value is True else f"{value:.1f}" if isinstance(value, float) else str(value)
        parts.append(f'{"class" if key == "cls" else key.replace("_", "-")}="{escape(shown)}"')
    opening = f"<{' '.join(parts)}>"
    return Markup(opening if name in VOID else f"{opening}{join(content)}</{name}>")


def join(content: object) -> Markup:
    """Contents one after the other (see `tag`)."""
    if content is None:
        return Markup("")
    if isinstance(content, list | tuple):
        return Markup("".join(join(part) for part in content))
    return content if isinstance(content, Markup) else Markup(escape(str(content)))


def details(summary: str, *content: object, opened: bool = False) -> Markup:
    """Something that unfolds."""
    return tag("details", tag("summary", summary), *content, open=opened)


def page(title: str, *content: object) -> str:
    """A whole document; it loads nothing."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', *content), lang='en')}\n"

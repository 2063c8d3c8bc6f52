"""Pages are complete in themselves, and no text on them is obeyed."""

from __future__ import annotations

from html_page import HtmlPage
from synthetic_run import HOSTILE

from r2m_ray.report.html import Figure, Section, Table, comparison_page

SHOWN = "<script>alert(1)</script> \\x1b[2J\\u202e & <img src=https://example.org/x>"


def test_every_text_of_a_comparison_is_shown_and_not_obeyed():
    section = Section(
        heading=HOSTILE,
        warnings=(HOSTILE,),
        notes=(HOSTILE,),
        tables=(Table(heading=HOSTILE, note=HOSTILE, head=(HOSTILE,), rows=((HOSTILE,),)),),
        figures=(Figure(HOSTILE, f'" onload="x {HOSTILE}', b"png"),),
    )
    text = comparison_page(HOSTILE, kind=HOSTILE, facts={HOSTILE: HOSTILE}, sections=[section])
    page = HtmlPage(text)
    # Title twice, kind, facts 2, section 3, table 4, figure 2; its alternative text is an attribute.
    assert page.text.count(SHOWN) == 14
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.elements}
    assert page.pictures == ["data:image/png;base64,cG5n"]
    assert "onload" not in dict(page.elements)["img"]
    assert not {"\x1b", "\u202e"} & set(text)


def test_a_table_in_markdown_cannot_be_broken_by_its_cells():
    table = Table(heading="", note="", head=("a|b", "c"), rows=(("x\n| y", "\x1b"),))
    assert table.markdown() == "| a\\|b | c |\n| --- | ---: |\n| x\\x0a\\| y | \\x1b |"

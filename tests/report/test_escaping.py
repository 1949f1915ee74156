"""Texts of strangers stay text in Markdown: rendered, they are what they were."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tasks.package import bundle, card, escaping
from tasks.package.release import Release

HOSTILE = "<img src=x onerror=alert(1)> `a` [b](javascript:c) *d* | e\n# f &lt; \\ _g_ ![h](i)"
RENDERER = MarkdownIt("commonmark").enable("table")
texts = st.text(
    alphabet=st.one_of(st.sampled_from("<>&`*_[]()|#~!\\-\n "), st.characters(codec="utf-8", exclude_characters="\0"))
)


@settings(deadline=None)
@given(texts)
@example(HOSTILE)
def test_a_text_in_a_line_is_rendered_as_it_is(text: str) -> None:
    _, inner, _ = RENDERER.parse(f"a {escaping.inline(text)} b")
    assert {child.type for child in inner.children} == {"text"}
    assert inner.children[0].content == f"a {' '.join(text.split())} b"


@settings(deadline=None)
@given(texts)
@example("``` x")
def test_code_in_a_line_is_rendered_as_it_is(text: str) -> None:
    line = " ".join(text.split())
    _, inner, _ = RENDERER.parse(f"a {escaping.code(text)} b")
    (found,) = [child for child in inner.children if child.type == "code_inline"]
    assert found.content.strip() == line


@settings(deadline=None)
@given(texts)
@example("````\n<b>out</b>\n````")
def test_a_block_is_rendered_as_it_is(text: str) -> None:
    found = RENDERER.parse(f"before\n\n{escaping.block(text)}\n\nafter")
    assert [each.type for each in found if each.level == 0] == [
        "paragraph_open", "paragraph_close", "fence", "paragraph_open", "paragraph_close",
    ]  # fmt: skip


def test_the_card_holds_no_markup_of_strangers() -> None:
    made = bundle.Bundle(
        name="m", chosen="q8_0", reason=f"it beats {HOSTILE}", variants={"q8_0": []}, targets={}, files={},
        minimum_ram_bytes=1, runtimes={}, licence=bundle.Licence(model=HOSTILE, data=HOSTILE),
        lineage={"model": {"repo": HOSTILE}, "data": {"name": HOSTILE, "rows": {HOSTILE: 3}}},
        evaluation={"q8_0": bundle.Evaluation(verdict="pass", metrics={"accuracy": 0.9})}, created_from={},
    )  # fmt: skip
    release = Release(
        name="m", variant="q8_0", weights=None, runtime_version="1", conversations_checked=1, adds_bos=False,
        needs_composed=False, prompt_format=None, dated=False, bos="", stops=(), system=f"````\n{HOSTILE}", example=[], answer="",
        context_length=1, minimum_ram_bytes=1, licence="",
    )  # type: ignore[arg-type]  # fmt: skip
    text = card.card(made, release).split("---\n", 2)[2]
    tokens = [child for token in RENDERER.parse(text) for child in (token, *(token.children or []))]
    assert not {token.type for token in tokens} & {"html_block", "html_inline", "link_open", "image", "em_open"}
    assert sum(token.content.count("<img src=x") for token in tokens if token.type == "text") == 7


@pytest.mark.parametrize("text", ["plain words, 0.95 and q4_k_m", "accuracy_retention is 0.2 (wanted 0.9)"])
def test_plain_text_is_left_alone(text: str) -> None:
    assert escaping.inline(text) == text

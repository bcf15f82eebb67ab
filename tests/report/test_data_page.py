import re

import pytest
from data_reports import ESC, MAIL, PHONE, RECORD, RLO, SHARED, make_report
from test_page import EVIL, Elements, plain, poison

from medcot.data.identifiers import mask_identifiers
from medcot.errors import DataError
from medcot.report.data_charts import draw_findings, draw_lengths, draw_way, list_steps
from medcot.report.data_page import render_data_page
from medcot.report.evidence import Look, make_visible, mask_pieces, read_evidence, read_says
from medcot.report.findings import build_findings

INVISIBLE = f"{RLO}\x1b\x00\x07\u2066\u200b\ud83d\ufeff\u2028"
HIDDEN = f"{ESC}{INVISIBLE}"


@pytest.fixture(scope="module")
def page():
    return render_data_page(make_report())


def find(report, name):
    return next(finding for finding in report["findings"] if finding["id"] == name)


def test_the_verdict_stands_on_top_in_words(page):
    text = plain(page)
    assert "Red: this data stops a run" in text
    assert "4 findings stop a run before its first step: no_reasoning, identifiers" in text
    assert "Red, but accepted by the recipe: forged_tags." in text
    assert page.index("Red: this data") < page.index("<svg") < page.index("<details") < page.index('id="lengths"')


@pytest.mark.parametrize(
    ("kept", "headline"),
    [
        ("yellow", "Yellow: nothing stops a run"),
        ("info", "Clean: no check found fault"),
        ("red", "Red: this data stops a run"),
    ],
)
def test_the_verdict_is_the_doctors(kept, headline):
    report = make_report(accepted=())
    report["findings"] = [finding for finding in report["findings"] if finding["severity"] == kept]
    report["verdict"] = {"info": "clean"}.get(kept, kept)
    assert headline in plain(render_data_page(report))


def test_severity_is_told_by_word_and_sign_besides_colour(page):
    for kind, sign, word in [("bad", "✕", "red"), ("warn", "▲", "yellow"), ("", "i", "info")]:
        assert f'<span class="chip {kind}"><span aria-hidden="true">{sign}</span> {word}</span>' in page
    red, yellow, info = (page.index(f'class="finding {word}"') for word in ("red", "yellow", "info"))
    assert red < yellow < info


def test_every_finding_has_its_remedy_its_rows_and_its_name(page):
    report, text = make_report(), plain(page)
    for finding in report["findings"]:
        assert finding["id"] in text
        assert " ".join(finding["fix"].split()) in text
        assert not finding["rows"] or finding["rows"][0] in text


def test_one_file_that_asks_for_nothing(page):
    elements = Elements(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(elements.tags)
    links = [value for _, key, value in elements.attributes if key in {"href", "xlink:href"}]
    assert links and all(link.startswith("#") for link in links)
    ids = [value for _, key, value in elements.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
    assert "default-src 'none'" in page


def test_text_from_anywhere_stays_text(page):
    report = poison(make_report())
    for finding in report["findings"]:
        finding["severity"] = finding["severity"].removesuffix(EVIL)
        for evidence in finding["evidence"]:
            evidence["parts"] |= {EVIL + HIDDEN: EVIL + HIDDEN}
        finding["figures"] = {key: value for key, value in finding["figures"].items() if key != "parts"}
        finding["figures"] |= {EVIL + HIDDEN: EVIL + HIDDEN, "long": (EVIL + HIDDEN) * 9}
    report["counts"] |= {EVIL + HIDDEN: EVIL + HIDDEN, EVIL: 3}
    report["sources"][0] |= {EVIL + HIDDEN: 5, "revision": EVIL + HIDDEN, "licence": EVIL + HIDDEN}
    report["sentences"].append(EVIL + HIDDEN)
    html = render_data_page(report)
    assert "<script" not in html and "<img" not in html
    assert set(Elements(html).tags) <= set(Elements(page).tags) | {"p"}
    assert not [key for _, key, _ in Elements(html).attributes if key.startswith("on")]
    assert "alert(1)" in plain(html) and "{{ 7*7 }}" in plain(html)
    assert not set(INVISIBLE) & set(html)
    assert "\\u202e" in html and "\\u001b[31m" in html and "\\ud83d" in html
    html.encode("utf-8")


def test_no_identifier_of_a_row_is_shown(page):
    report = make_report()
    for name in ("over_length", "eos_lost", "contamination_confirmed"):
        find(report, name)["says"] += f" First: 'ask {MAIL}'."
        find(report, name)["evidence"] += [{"row": "x", "parts": {"question": f"{RECORD}, {PHONE}", "set aside": MAIL}}]
    report["sentences"].append(f"Row 1 is '{MAIL}'.")
    for html in (page, render_data_page(report)):
        for secret in (PHONE, MAIL, "00482913", "555-0187", "-0187"):
            assert secret not in html
    assert "[phone]" in page and "[e-mail: ****.***@*******.***]" in page


def test_an_identifier_is_masked_wherever_its_text_is_cut():
    text = f"Dr. Jane Roe, {PHONE}, {MAIL}; {RECORD} seen on 03/14/2019."
    for first in range(0, len(text) + 1, 3):
        for second in range(first, len(text) + 1, 7):
            pieces = mask_pieces([text[:first], text[first:second], text[second:]])
            assert "".join(pieces) == mask_identifiers(text)[0]
    assert mask_pieces(["no one ", "", "here"]) == ["no one ", "", "here"]
    assert mask_pieces([]) == []


def test_what_a_sentence_says_of_dates_is_left_to_mangled_dates_alone():
    says = "1 row holds what a spreadsheet made a date (2-May)."
    assert read_says({"id": "mangled_dates", "says": says}) == says
    assert "[date]" in read_says({"id": "eos_lost", "says": says})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\nlines\tand ünïcödé 患者 😀", "plain\nlines\tand ünïcödé 患者 😀"),
        ("a\r\nb\rc", "a\nb\\u000dc"),
        ("x\u00a0\u3000y", "x\u00a0\u3000y"),
        ("می\u200cخواهم 👩\u200d⚕", "می\u200cخواهم 👩\u200d⚕"),
        ("\x1b]0;x\x07 \u202e \ue000 \U000e0041 \ud800", "\\u001b]0;x\\u0007 \\u202e \\ue000 \\U000e0041 \\ud800"),
    ],
)
def test_only_what_is_not_visible_is_written_out(text, shown):
    assert make_visible(text) == shown


def test_the_passage_that_two_texts_share_is_marked_in_both(page):
    assert page.count(f"<mark>{SHARED}.</mark>") == 2
    assert "⟦" not in page
    assert "<mark>&lt;think&gt;</mark>" in page


def test_only_differing_words_of_near_duplicates_are_marked():
    parts = {"a": "The patient has low sodium\nand is dry.", "b": "The patient had low sodium\nand is very dry."}
    (shown,) = read_evidence({"id": "duplicates_near", "evidence": [{"row": "a", "parts": parts}]})
    first, second = ([piece.text for piece in p.pieces if piece.look is Look.MARKED] for p in shown.passages)
    assert (first, second) == ([], ["had", "very"])
    assert [passage.text for passage in shown.passages] == list(parts.values())


def test_a_row_is_shown_by_span_and_loss(page):
    evidence = find(make_report(), "eos_lost")["evidence"]
    (shown,) = read_evidence({"id": "eos_lost", "evidence": evidence})
    seen = [(piece.look.value, piece.has_loss, piece.text.strip()) for piece in shown.spans if piece.text.strip()]
    assert seen[1:] == [
        ("question", False, "Is saline hypotonic? Ring [phone]"),
        ("question", True, "."),
        ("tag", False, "<think>"),
        ("think", True, "Weighing it."),
        ("tag", True, "</think>"),
        ("answer", True, "No."),
        ("eos", False, "<|im_end|>"),
    ]
    assert seen[0][2].startswith("Below is") and " […] " in seen[0][2] and seen[0][2].endswith("### Question:")
    assert '<span class="span answer"><b>answer</b>No.</span>' in page
    assert '<span class="span eos no-loss"><b>EOS, no loss</b>&lt;|im_end|&gt;</span>' in page
    assert '<span class="span tag">&lt;/think&gt;</span>' in page and "<b></b>" not in page


def test_lengths_are_drawn_with_their_limit(page):
    figures = find(make_report(), "lengths")["figures"]
    chart = draw_lengths(figures)
    assert "limit 2,048" in chart.svg and "var(--bad)" in chart.svg and "#0a00" not in chart.svg
    assert chart.reading == "mean 1,375, 400 to 2,350; limit 2,048"
    assert "var(--bad)" not in draw_lengths(figures | {"max_tokens": 9000}).svg
    assert "over_length: droploses 7 rows with 15,400 tokens" in plain(page)
    assert draw_lengths({}) is None


@pytest.mark.parametrize(
    ("counts", "steps"),
    [
        ({}, []),
        ({"raw_rows": 9, "unreadable": 0, "examples": 9}, [("Raw rows", 9, 0), ("Examples", 9, 0)]),
        (
            {"raw_rows": 9, "unreadable": 2, "removed_exact": 1, "held_out": 3, "rows": 2},
            [("Raw rows", 9, 0), ("Unreadable", 7, 2), ("Removed: exact copies", 6, 1), ("Held out", 3, 3),
             ("Not encoded or left out", 2, 1), ("Trained on", 2, 0)],
        ),
        ({"raw_rows": 4, "rows": 12}, [("Raw rows", 4, 0), ("Trained on, with repeats", 12, 0)]),
        ({"raw_rows": "?", "rows": 12}, []),
    ],
)  # fmt: skip
def test_no_row_is_lost_on_the_way(counts, steps):
    assert list_steps(counts) == steps
    assert (draw_way(counts) is None) == (not steps)


def test_the_chart_of_findings_says_what_it_leaves_out():
    many = [{"id": f"finding_{n}", "severity": "yellow", "count": 99} for n in range(14)]
    assert draw_findings(many, 50).reading == "the first 12 of 14"
    assert "100.0\u202f% · yellow" in draw_findings(many[:1], 50).svg
    assert draw_findings([{"id": "x", "severity": "info", "count": 3}], 9) is None
    assert draw_findings(many, 0) is None


def test_lineage_names_the_source_and_not_the_machine(page):
    assert f'<code class="hash" title="{"ab" * 32}">abababababab…</code>' in page
    assert "rows.jsonl" in page and "/srv/someone" not in page
    assert "not\u00a0stated" in page
    assert "Column 'q' is the question (a name medcot knows)." in plain(page)
    stated = make_report()
    stated["sources"][0] |= {"licence": "apache-2.0", "revision": "0123456789abcdef"}
    html = render_data_page(stated)
    assert "apache-2.0" in html and 'title="0123456789abcdef"' in html


@pytest.mark.parametrize("missing", [["findings"], ["sources"], ["counts"], ["sentences"], ["accepted", "date"]])
def test_what_is_not_known_is_left_out(missing):
    report = {key: value for key, value in make_report().items() if key not in missing}
    assert "</html>" in render_data_page(report)


def test_a_source_that_cannot_be_read_has_a_page():
    finding = {"id": "source_unreadable", "severity": "red", "count": 0, "rows": [], "says": "x is empty.", "fix": "y"}
    text = plain(render_data_page({"version": 1, "verdict": "red", "findings": [finding]}))
    assert "This source cannot be read" in text and "x is empty." in text


def test_a_report_of_another_version_is_refused():
    with pytest.raises(DataError, match="version 2"):
        render_data_page(make_report() | {"version": 2})


def test_findings_come_worst_first_and_accepted_ones_behind():
    views = build_findings(make_report())
    assert [view.severity for view in views] == sorted((v.severity for v in views), key=["red", "yellow", "info"].index)
    assert [view.id for view in views if view.severity == "red"][-1] == "forged_tags"
    assert [view.id for view in views if view.is_accepted] == ["forged_tags"]


def test_the_same_report_gives_the_same_bytes(page):
    assert render_data_page(make_report()) == page
    assert not re.search(r"url\((?!#)|@import", page)

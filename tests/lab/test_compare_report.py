"""What the report says and shows, of folders made for the purpose."""

from __future__ import annotations

import gzip
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compare_folders import plan, write_comparison
from lasgd.errors import ConfigurationError
from lasgd.lab.compare.plan import Cell, Plan
from lasgd.lab.report import tables, words
from lasgd.lab.report.looks import LIGHT, inlined, looks
from lasgd.lab.report.source import Source, read_source, spread
from lasgd.lab.report.strips import COLUMNS, coverage, rows, strip
from lasgd.lab.report.tables import Table
from lasgd.lab.report.write import html, write


def folder(out: Path, asked: Plan, **of_label: Mapping[str, Any]) -> Path:
    """A comparison in which every run is there, each as its entry says."""
    runs = {
        cell: {**of_label.get("all", {}), **of_label.get(cell.entry.label.partition(":")[0], {})}
        for condition in asked.conditions
        for seed in asked.seeds
        for cell in asked.cells(seed, condition)
    }
    write_comparison(out, asked, runs)
    return out


def source(out: Path, asked: Plan, **of_label: Mapping[str, Any]) -> Source:
    return read_source([folder(out, asked, **of_label)])


def cells(table: Table, label: str) -> dict[str, str]:
    """The row of one entry, by column."""
    [row] = [row for row in table.rows if row[0] == label]
    return dict(zip(table.columns, row, strict=True))


# Tables and words


def test_the_soonest_comes_first_with_its_ratio_to_the_reference(tmp_path):
    found = source(tmp_path, plan("a,b", reference="b", target=0.7), a={"wall_s": 10.0}, b={"wall_s": 42.0})
    table = tables.to_target(found, "fast")
    assert [row[0] for row in table.rows] == ["a", "b"]
    assert cells(table, "a")["time to target"] == "7.50 s"
    assert cells(table, "a")["sooner than b"] == "4.20 x"
    assert cells(table, "b")["sooner than b"] == "1"
    assert words.reading(found, "fast") == "a reached the target first, after 7.50 s; 4.20 x sooner than b (31.5 s)."


def test_who_never_reaches_the_target_comes_last_and_has_no_ratio(tmp_path):
    found = source(tmp_path, plan("a,b", reference="b", target=0.75), a={"top1": (0.1, 0.2), "wall_s": 1.0})
    table = tables.to_target(found, "fast")
    assert [row[0] for row in table.rows] == ["b", "a"]
    assert (cells(table, "a")["time to target"], cells(table, "a")["sooner than b"]) == ("not reached", "-")
    assert words.reading(found, "fast") == "b reached the target first, after 8.75 s; never reached by a."


def test_the_mean_is_over_the_seeds_that_reached_it_and_the_table_says_how_many(tmp_path):
    asked = plan("a,b", reference="b", target=0.7, seeds=(0, 1))
    runs = {cell: {"wall_s": 10.0} for seed in (0, 1) for cell in asked.cells(seed, "fast")}
    runs[Cell(asked.entries[0], "fast", 1)] = {"top1": (0.1, 0.2), "wall_s": 10.0}
    write_comparison(tmp_path, asked, runs)
    found = read_source([tmp_path])
    row = cells(tables.to_target(found, "fast"), "a")
    assert (row["time to target"], row["seeds that reached it"]) == ("7.50 s", "1 of 2")
    assert row["sooner than b"] == "1.00 x (1 of 2 seeds)"
    assert "with some seeds only: a (1 of 2 seeds)" in words.reading(found, "fast")


def test_there_is_no_ratio_to_a_reference_that_never_got_there(tmp_path):
    found = source(tmp_path, plan("a,b", reference="b", target=0.7), b={"top1": (0.1, 0.2)})
    assert cells(tables.to_target(found, "fast"), "a")["sooner than b"] == "-"
    assert words.reading(found, "fast") == "a reached the target first, after 7.50 s; never reached by b."


def test_the_spread_over_seeds_is_shown(tmp_path):
    asked = plan("a", reference="a", target=0.7, seeds=(0, 1))
    runs = {cell: {"wall_s": 10.0 * (1 + cell.seed)} for seed in (0, 1) for cell in asked.cells(seed, "fast")}
    write_comparison(tmp_path, asked, runs)
    row = cells(tables.to_target(read_source([tmp_path]), "fast"), "a")
    assert row["time to target"] == "11.2 s (7.50 s to 15.0 s)"


def test_near_equals_are_called_level(tmp_path):
    found = source(tmp_path, plan("a,b,c", reference="c", target=0.7), b={"wall_s": 10.3}, c={"wall_s": 20.0})
    assert "a reached the target first, after 7.50 s, and b within 5 % of it" in words.reading(found, "fast")


def test_without_a_target_the_report_says_why(tmp_path):
    found = source(tmp_path, plan("a,b", reference="b"), b={"status": "failed", "error": "broke"})
    assert words.reading(found, "fast") == "no target, for no run of b finished."
    html(found)


def test_a_failed_run_is_a_warning_with_its_reason_and_in_the_table_of_runs(tmp_path):
    found = source(tmp_path, plan("a,b"), a={"status": "failed", "error": "rank 1 | killed"})
    assert "a, fast, seed 0: failed: rank 1 | killed" in words.warnings(found)
    table = tables.all_runs(found)
    assert table.rows[0][4] == "failed: rank 1 | killed" and table.marked == {0}
    assert "rank 1 \\| killed" in table.markdown()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"padding_overrun": 0.034}, "a, fast: in 1 of 1 run up to 3.4 % of the steps outlasted their padding"),
        ({"replicas_identical": False}, "a, fast: in 1 of 1 run the replicas differ at the end."),
        ({"health": [{"rank": 0, "round": 3}]}, "a, fast: ranks held NaN or Inf, or ran away, 1 time"),
    ],
)
def test_what_speaks_against_a_run_is_said(tmp_path, how, said):
    found = source(tmp_path, plan("a,b"), a=how)
    assert any(warning.startswith(said) for warning in words.warnings(found)), words.warnings(found)


def test_an_overrun_within_the_limit_is_not_worth_a_warning(tmp_path):
    found = source(tmp_path, plan("a,b", seeds=(0, 1)), a={"padding_overrun": 0.019})
    assert words.warnings(found) == []


def test_independent_replicas_may_differ(tmp_path):
    found = source(tmp_path, plan("independent,b", seeds=(0, 1)), independent={"replicas_identical": False})
    assert words.warnings(found) == []


def test_a_rate_at_the_edge_of_the_grid_is_a_warning(tmp_path):
    asked = plan("a", lr_grid=(0.1, 0.2), reference="a")
    write_comparison(tmp_path, asked, {cell: {"loss": cell.lr or 1.0} for cell in asked.tries("fast")})
    write_comparison(tmp_path, asked.with_choice("fast", "a", 0.1), {})
    found = read_source([tmp_path])
    assert any("at the edge of the grid (0.1 in fast)" in warning for warning in words.warnings(found))
    assert cells(tables.grid(found), "a")["lr 0.1"] == "[0.100]"
    assert "[0.100]" in write([tmp_path], tmp_path)[1].read_text()


def test_fewer_seeds_than_asked_are_a_warning(tmp_path):
    asked = plan("a", seeds=(0, 1, 2), reference="a")
    runs = {Cell(asked.entries[0], "fast", seed): {} for seed in (0, 1)}
    write_comparison(tmp_path, asked, runs)
    found = words.warnings(read_source([tmp_path]))
    assert "1 run of 3 not run yet: the same command goes on with them." in found
    assert "a, fast: 2 of 3 seeds finished; means are over those." in found


def test_one_seed_only_is_said(tmp_path):
    assert "one seed only" in words.warnings(source(tmp_path, plan("a")))[-1]


def test_retention_and_waiting_are_in_the_table(tmp_path):
    row = cells(tables.pace(source(tmp_path, plan("a"), a={"wall_s": 20.0, "waited_s": 5.0})), "a")
    assert (row["retention"], row["waited a rank"], row["of the time"]) == ("50.0 %", "5.00 s", "25.0 %")


def test_bytes_are_per_rank_and_per_thousand_samples_of_all(tmp_path):
    row = cells(tables.traffic(source(tmp_path, plan("a"))), "a")
    assert (row["sent by a rank"], row["sent by all, per 1,000 samples"]) == ("4.0 MB", "8.0 MB")


def test_spread_passes_over_what_is_not_there():
    assert spread([None, 1.0, 3.0]) == (2.0, 1.0, 3.0)
    assert spread([None]) is None


# Several folders


def test_runs_of_the_same_name_are_told_apart_by_folder(tmp_path):
    one = folder(tmp_path / "one", plan("a,b"), a={"wall_s": 10.0})
    two = folder(tmp_path / "two", plan("a,c", reference="a"), a={"wall_s": 20.0})
    found = read_source([one, two])
    assert list(found.entries) == ["a", "b", "a [two]", "c"]
    assert [run.path.parents[3].name for run in found.of("fast", "a [two]")] == ["two"]


def test_entries_of_other_conditions_keep_their_name(tmp_path):
    one = folder(tmp_path / "one", plan("a,b"))
    two = folder(tmp_path / "two", plan("a,b", conditions=("slow",)))
    assert list(read_source([one, two]).entries) == ["a", "b"]


def test_all_folders_are_held_to_the_same_target(tmp_path):
    one = folder(tmp_path / "one", plan("a", target=0.7))
    two = folder(tmp_path / "two", plan("b", target=0.5))
    found = read_source([one, two])
    assert [run.figures["seconds_to_target"] for run in found.runs] == [7.5, 7.5]


# The page


class Page(HTMLParser):
    """What a browser would fetch, and whether every element is closed."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if tag in ("script", "link", "img", "iframe", "object", "image"):
            self.fetched.append(tag)
        self.fetched += [value for name, value in attrs if name == "src" and value]
        if known.get("id"):
            self.ids.add(known["id"] or "")
        href = known.get("href") or known.get("xlink:href")
        if href:
            self.links.add(href)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag


FULL: dict[str, Any] = {"timeline": True, "consensus": True, "histogram": {"1": 3, "2": 1}, "waited_s": 2.0}


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> str:
    asked = plan("a,b,c:steps-per-round=5", conditions=("fast", "slow"), seeds=(0, 1), reference="b")
    return html(source(tmp_path_factory.mktemp("full"), asked, all=FULL))


def test_the_page_needs_nothing_but_itself(full):
    page = Page(full)
    assert page.fetched == []
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= page.ids
    assert "@import" not in full and "@font-face" not in full
    assert not re.search(r"url\((?!#)", full)


def test_every_element_of_the_page_is_closed(full):
    assert Page(full).open == []


def test_the_page_shows_all_that_runs_have_measured(full):
    for heading in ("Staleness and consensus distance", "Ten seconds from the middle of a run", "All runs"):
        assert heading in full
    charts = re.findall(r'<svg class="chart"[^>]*aria-label="([^"]*)"', full)
    assert sum("Top-1 against" in says for says in charts) == 4
    assert sum("Histogram" in says for says in charts) == sum("Consensus" in says for says in charts) == 2
    assert any("Retention" in says for says in charts) and any("Waiting" in says for says in charts)
    assert len(re.findall('<svg class="strip"', full)) == 6


def test_points_are_rounded_and_what_is_written_is_not():
    drawn = '<svg viewBox="0 0 1 1"><path d="M 1.23456 2.98765"/><text x="3.14159">0.0001</text></svg>'
    small = inlined(drawn, "says")
    assert 'd="M 1.23 2.98"' in small and 'x="3.14"' in small
    assert ">0.0001<" in small


def test_pictures_take_their_colours_from_the_page(full):
    for picture in re.findall(r"<svg class=\"chart\".*?</svg>", full, re.DOTALL):
        assert not re.search(r"#[0-9a-f]{6}\b(?!\")", re.sub(r'(url\(|href=")#\w+', "", picture)), picture[:200]
        assert "var(--ink)" in picture
    assert "prefers-color-scheme: dark" in full
    used = set(re.findall(r"var\((--[\w-]+)\)", full))
    dark = full[full.index("prefers-color-scheme") :].split("}")[0]
    assert used <= {name for name in re.findall(r"(--[\w-]+):", dark)}


def test_pictures_are_well_formed(full):
    pictures = re.findall(r"<svg class=\"(?:chart|strip)\".*?</svg>", full, re.DOTALL)
    assert pictures
    for picture in pictures:
        ElementTree.fromstring(picture.replace("<svg ", '<svg xmlns:xlink="x" ', 1))


def test_what_was_not_measured_is_not_shown(tmp_path):
    page = html(source(tmp_path, plan("a,b")))
    assert "Consensus distance" not in page and "Histogram" not in page and '<h2 id="grid"' not in page
    assert "no timeline" in page


def test_text_from_runs_is_not_taken_for_html(tmp_path):
    page = html(source(tmp_path, plan("a,b"), a={"status": "failed", "error": "<script>alert(1)</script>"}))
    assert "<script" not in page and "&lt;script&gt;" in page


def test_nothing_but_failures_still_makes_a_report(tmp_path):
    failed = {"status": "failed", "error": "broke"}
    page = html(source(tmp_path, plan("a,b"), all=failed))
    assert page.count("broke") >= 4


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    out = folder(tmp_path, plan("a,b"), all=FULL)
    first = [path.read_bytes() for path in write([out], tmp_path / "x")]
    assert [path.read_bytes() for path in write([out], tmp_path / "x")] == first


def test_runs_whose_folders_are_gone_keep_their_figures(tmp_path):
    import shutil

    out = folder(tmp_path, plan("a,b", target=0.7), all=FULL)
    shutil.rmtree(out / "runs")
    [page, text] = write([out], out)
    assert "7.50 s" in text.read_text() and "no timeline" in page.read_text()


def test_markdown_has_a_row_for_every_entry_and_ends_its_tables(tmp_path):
    text = write([folder(tmp_path, plan("a,b", target=0.7))], tmp_path)[1].read_text()
    assert "| a | 0.1 | 7.50 s | 1 of 1 |" in text
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1, block


def test_a_place_where_nothing_can_be_written_is_refused(tmp_path):
    out = folder(tmp_path / "one", plan("a"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be used as a folder"):
        write([out], tmp_path / "file")


# Looks and strips


def test_fourteen_entries_are_told_apart_by_colour_and_line_and_by_marker():
    found = looks([str(n) for n in range(14)]).values()
    assert len({(look.css, look.dashes) for look in found}) == 14
    assert len({look.marker for look in found}) == 14


@pytest.mark.parametrize("paper", ["#ffffff", "#14181c"])
def test_lines_have_the_contrast_that_graphics_need(paper):
    from lasgd.lab.report.looks import DARK

    for colour in LIGHT if paper == "#ffffff" else DARK:
        bright, dim = sorted((luminance(colour) + 0.05, luminance(paper) + 0.05), reverse=True)
        assert bright / dim >= 3, colour  # WCAG 2.1, 1.4.11


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def event(name: str, begin_s: float, end_s: float, rank: int = 0) -> dict[str, Any]:
    return {"ph": "X", "pid": rank, "name": name, "ts": begin_s * 1e6, "dur": (end_s - begin_s) * 1e6}


@pytest.mark.parametrize(
    ("intervals", "wanted"),
    [
        ([(0.0, 4.0)], [1, 1, 1, 1]),
        ([(0.5, 2.25)], [0.5, 1, 0.25, 0]),
        ([(1.25, 1.5), (1.5, 1.75)], [0, 0.5, 0, 0]),
        ([(2.75, 3.25)], [0, 0, 0.25, 0.25]),
        ([(3.5, 4.0), (4.0, 4.0)], [0, 0, 0, 0.5]),
        ([], [0, 0, 0, 0]),
    ],
)
def test_coverage_is_the_share_of_each_column(intervals, wanted):
    assert coverage(intervals, columns=4) == pytest.approx(wanted)


def test_a_strip_adds_up_to_the_time_that_was_waited():
    events = [event("compute", t, t + 0.06) for t in np.arange(0, 10, 0.1)]
    events += [event("wait", t + 0.06, t + 0.1) for t in np.arange(0, 10, 0.1)]
    [row] = rows(events, 0.0, 10.0)
    assert (row.compute.mean(), row.wait.mean()) == pytest.approx((0.6, 0.4))


def test_what_lies_outside_of_the_window_is_cut():
    [row] = rows([event("compute", 0, 100), event("round", 4, 6), event("round", 200, 300)], 5.0, 15.0)
    assert row.compute.min() == 1.0
    assert row.rounds == [(0.0, pytest.approx(COLUMNS / 10))]


def test_an_exchange_is_drawn_as_a_round():
    [row] = rows([event("exchange", 1, 2)], 0.0, 10.0)
    assert len(row.rounds) == 1


def test_the_window_is_ten_seconds_from_the_middle(tmp_path):
    found = source(tmp_path, plan("a"), all={"timeline": True, "wall_s": 40.0})
    picture = strip(found.runs[0])
    assert picture is not None and "15.0 s to 25.0 s" in picture


def test_a_long_timeline_makes_no_large_picture():
    events = [event(kind, t, t + 0.0005) for t in np.arange(0, 10, 0.001) for kind in ("compute", "round")]
    assert sum(len(row.rounds) for row in rows(events, 0.0, 10.0)) <= COLUMNS


def test_a_broken_timeline_is_no_timeline(tmp_path):
    found = source(tmp_path, plan("a"), all={"timeline": True})
    for data in (b"", b"text", gzip.compress(b"{}"), gzip.compress(b"[]")[:-3]):
        (found.runs[0].path / "timeline.json.gz").write_bytes(data)
        assert strip(found.runs[0]) is None


def test_a_figure_that_is_nan_does_not_stop_the_report(tmp_path):
    html(source(tmp_path, plan("a,b"), a={"loss": None, "top1": (0.1, math.nan)}))

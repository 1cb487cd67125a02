"""What documents say of the code's own tables and files is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT, anchors, blocks, text_of, without_blocks

from lasgd.pace import Column
from lasgd.runtime.phase import MOVES, Phase
from lasgd.training.settings import OWN_TO_A_RANK

SOURCES = sorted((ROOT / "src").rglob("*.py"))


def phases_diagram() -> str:
    """The moves as a Mermaid diagram; moves between the same two phases share an arrow."""
    arrows: dict[tuple[Phase, Phase], list[str]] = {}
    for (before, event), after in MOVES.items():
        arrows.setdefault((before, after), []).append(event)
    lines = ["stateDiagram-v2", f"    [*] --> {Phase.READY.value}"]
    lines += [f"    {a.value} --> {b.value}: {', '.join(events)}" for (a, b), events in arrows.items()]
    return "\n".join([*lines, f"    {Phase.CLOSED.value} --> [*]", ""])


def test_the_phases_are_drawn_as_the_table_of_moves_has_them():
    [block] = blocks("docs/concurrency.md", "mermaid")
    assert block.text == phases_diagram(), "put this into docs/concurrency.md:\n" + phases_diagram()


def test_the_header_is_described_column_by_column():
    table = text_of("docs/algorithms.md").split("| column |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [column.name.lower() for column in Column]


def test_the_readme_lists_every_module_with_a_line():
    [tree] = [block.text for block in blocks("README.md", "text") if block.text.startswith("src/lasgd/")]
    shown, folder = set(), Path("src/lasgd")
    for line in tree.splitlines()[1:]:
        found = re.fullmatch(r"( *)([\w./]+)(?: +(\S.*))?", line)
        assert found, line
        depth, name, says = len(found[1]) // 2, found[2], found[3]
        if depth == 0:
            assert (ROOT / name).is_dir(), f"{name} does not exist"
        elif name.endswith("/"):
            folder = Path("src/lasgd") / name
        else:
            assert says, f"{name}: what is it for?"
            shown.add((folder / name if depth == 2 else Path("src/lasgd") / name).as_posix())
    plumbing = ("__init__.py", "__main__.py")
    assert shown == {path.relative_to(ROOT).as_posix() for path in SOURCES if path.name not in plumbing}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(document)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert there.is_relative_to(ROOT) and there.exists(), f"{document}: {target}"
        if anchor:
            assert anchor in anchors(there.relative_to(ROOT).as_posix()), f"{document}: {target}"


def test_places_that_error_messages_point_to_exist():
    pointers = {
        found for path in SOURCES for found in re.findall(r"(docs/[\w/-]+\.md)(?:#([\w-]+))?", path.read_text("utf-8"))
    }
    assert ("docs/footguns.md", "silent-rank") in pointers
    for document, anchor in pointers:
        assert (ROOT / document).is_file(), document
        assert not anchor or anchor in anchors(document), f"{document}#{anchor}"


def test_no_device_wide_synchronise_is_in_the_source():
    for path in SOURCES:
        assert "cuda.synchronize" not in path.read_text("utf-8"), path


def test_a_resumed_run_may_differ_where_the_footguns_say_so():
    assert frozenset({"ranks", "workers", "device", "timeout_s", "start_timeout_s"}) == OWN_TO_A_RANK


def test_the_design_notes_are_all_listed():
    notes = {path.name for path in (ROOT / "docs/design").glob("0*.md")}
    assert notes == set(re.findall(r"\]\((0\d+-[\w-]+\.md)\)", text_of("docs/design/README.md")))


def test_the_licence_is_the_one_that_the_package_names():
    assert text_of("LICENSE").lstrip().startswith("Apache License")
    assert "Copyright 2026 the lasgd authors" in text_of("LICENSE")
    assert 'license = "Apache-2.0"' in text_of("pyproject.toml")

"""Python that documents show runs, with all it asserts."""

from __future__ import annotations

import pytest
import torch
from documents import DOCUMENTS, Block, blocks

import lasgd
from helpers import batch, small_model

WITH_PYTHON = [document for document in DOCUMENTS if blocks(document, "python")]


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_the_python_in_a_document_runs_from_top_to_bottom(document):
    namespace: dict = {}
    for block in blocks(document, "python"):
        run(block, block.text, namespace)


def test_the_guide_to_writing_an_algorithm_is_among_them():
    assert "docs/algorithms.md" in WITH_PYTHON


@pytest.fixture
def ordinary_loop(monkeypatch):
    """What the README's loop takes for granted, as the only rank, with the budget that the README names cut down."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    model = small_model()
    original = lasgd.attach
    monkeypatch.setattr(lasgd, "attach", lambda *given, **options: original(*given, **{**options, "samples": 8}))
    return {
        "lasgd": lasgd,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": torch.nn.functional.mse_loss,
        "loader": [batch(seed) for seed in range(3)],
    }


def readme_diff() -> Block:
    [block] = blocks("README.md", "diff")
    return block


def test_the_readmes_diff_turns_an_ordinary_loop_into_one_that_averages(ordinary_loop):
    block = readme_diff()
    run(block, "\n".join(line[1:] for line in block.text.splitlines()), ordinary_loop)
    assert ordinary_loop["averaging"].tally.local_steps > 0
    assert ordinary_loop["averaging"].finished


def test_the_loop_without_the_readmes_diff_is_an_ordinary_one(ordinary_loop):
    block = readme_diff()
    before = [line[5:] for line in block.text.splitlines() if line.startswith(" ")]  # one level of indentation less
    weight = ordinary_loop["model"][0].weight.clone()
    run(block, "\n".join(before), ordinary_loop)
    assert not torch.equal(weight, ordinary_loop["model"][0].weight)


def run(block: Block, code: str, namespace: dict) -> None:
    padding = "\n" * (block.line - 1)  # so that a traceback shows the document's own line
    exec(compile(padding + code, block.document, "exec"), namespace)

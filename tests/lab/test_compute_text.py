"""The language of --compute."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasgd.errors import ConfigurationError, DataError
from lasgd.lab.compute_text import parse_compute
from lasgd.virtual.compute_models import Constant, LogNormal, Stalls, Stragglers, Trace


@pytest.mark.parametrize(
    "text, model",
    [
        ("100ms", Constant(0.1)),
        (" 1.5S ", Constant(1.5)),
        ("lognormal=100ms,sigma=0.2", LogNormal(0.1, 0.2, 7)),
        ("LogNormal = 100ms , sigma = .2", LogNormal(0.1, 0.2, 7)),
        ("100ms+straggler=last:4x", Stragglers(Constant(0.1), {3: 4.0})),
        ("100ms+straggler=1:1x", Constant(0.1)),
        ("100ms+stall=1s@1%", Stalls(Constant(0.1), 1.0, 0.01, 7)),
        (
            "lognormal=100ms,sigma=0.2+stall=1s@1%+straggler=0:2x",
            Stalls(Stragglers(LogNormal(0.1, 0.2, 7), {0: 2.0}), 1.0, 0.01, 7),
        ),
    ],
)
def test_text_becomes_a_model(text, model):
    assert parse_compute(text, 4, 7) == model


@pytest.mark.parametrize("name", ["Steps.csv", "a+b.csv", "link=20mbit+straggler=last:4x.csv"])
def test_a_trace_is_read_from_a_file_of_any_name(tmp_path, name):
    path = tmp_path / name
    path.write_text("rank,step_s\n0,0.1\n0,0.2\n")
    assert parse_compute(f"trace={path}", 4, 0) == Trace(((0.1, 0.2),))
    slowed = parse_compute(f"trace={path} + Straggler=0:2x", 4, 0)
    assert list(islice(slowed.durations(0), 2)) == [0.2, 0.4]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("", "'' is not a duration (a positive decimal number and s or ms or us). Expected 100ms, lognormal="),
        ("100", "compute part '100': '100' is not a duration"),
        ("0ms", "Expected 1us to 3600s"),
        ("lognorml=100ms,sigma=0.2", "Did you mean 'lognormal'?"),
        ("lognormal", "`lognormal` needs a value. Expected lognormal=100ms,sigma=0.2"),
        ("lognormal=100ms", "sigma is '', not a positive decimal number. Expected lognormal=100ms,sigma=0.2"),
        ("lognormal=100ms,sigma=-1", "sigma is '-1'"),
        ("lognormal=100ms,sigma=99", "sigma is 99.0; expected 0 to 10"),
        ("lognormal=100ms,sgma=0.2", "Did you mean 'sigma'?"),
        ("lognormal=100ms,sigma=1,sigma=1", "sigma is given twice"),
        ("lognormal=fast,sigma=1", "'fast' is not a duration"),
        ("trace", "`trace` needs a value"),
        ("trace=", "no file is named. Expected trace=runs/first/timeline.json.gz"),
        ("straggler=last:4x", "the time of a step comes first. Expected 100ms+straggler=last:4x"),
        ("100ms+stragler=last:4x", "Did you mean 'straggler'?"),
        ("100ms+step=100ms", "part 'step' is not known. Known: stall, straggler."),
        ("100ms+lognormal=100ms,sigma=1", "step times are given twice"),
        ("100ms+", "part '' is not known"),
        ("100ms+straggler=7:4x", "no rank 7 among 4 ranks"),
        ("100ms+stall=1s", "Expected stall=1s@1%"),
    ],
)
def test_bad_text_is_refused_with_the_part_and_what_was_expected(text, shown):
    with pytest.raises(ConfigurationError) as refused:
        parse_compute(text, 4, 0)
    assert shown in str(refused.value)


def test_a_trace_that_does_not_exist_is_named():
    with pytest.raises(DataError, match=r"nowhere\.csv cannot be read: No such file"):
        parse_compute("trace=nowhere.csv+stall=1s@1%", 4, 0)


@given(st.text(alphabet="lognrmaistceup=:@%+,.0123456789xms -", max_size=30))
def test_no_text_raises_anything_but_a_configuration_error(text):
    try:
        assert next(parse_compute(text, 4, 0).durations(0)) > 0
    except ConfigurationError:
        return

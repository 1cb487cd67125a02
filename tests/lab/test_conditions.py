import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasgd.errors import ConfigurationError
from lasgd.lab.conditions import PRESETS, Condition, parse

SECONDS = st.floats(1e-6, 3600.0)


@st.composite
def conditions(draw):
    bandwidth = draw(st.none() | st.floats(125.0, 1.25e11))
    stall = draw(st.just(0.0) | SECONDS)
    names = draw(st.lists(st.integers(0, 10**6) | st.just("last"), unique=True, max_size=4))
    return Condition(
        bandwidth_bytes_per_s=bandwidth,
        latency_s=0.0 if bandwidth is None else draw(st.just(0.0) | SECONDS),
        step_s=draw(st.none() | SECONDS),
        round_s=draw(st.none() | SECONDS),
        stall_s=stall,
        stall_probability=draw(st.floats(0.0, 1.0)) if stall else 0.0,
        stragglers=tuple((name, draw(st.floats(1.0, 1000.0))) for name in names),
    )


@given(conditions())
def test_canonical_text_parses_to_the_same_condition(condition):
    assert parse(str(condition)) == condition


@given(conditions())
def test_canonical_text_is_its_own_canonical_text(condition):
    assert str(parse(str(condition))) == str(condition)


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("fast", Condition()),
        ("link=20mbit", Condition(bandwidth_bytes_per_s=2.5e6)),
        ("link=0.5gbit", Condition(bandwidth_bytes_per_s=6.25e7)),
        ("link=64kbit", Condition(bandwidth_bytes_per_s=8000.0)),
        ("link=100mbit,latency=20ms", Condition(bandwidth_bytes_per_s=1.25e7, latency_s=0.02)),
        ("straggler=3:4x", Condition(stragglers=((3, 4.0),))),
        ("straggler=last:2.5x", Condition(stragglers=(("last", 2.5),))),
        ("straggler=last:2x+straggler=0:3x", Condition(stragglers=((0, 3.0), ("last", 2.0)))),
        ("stall=1s@1%", Condition(stall_s=1.0, stall_probability=0.01)),
        ("stall=250us@0%", Condition(stall_s=0.00025)),
        ("step=100ms", Condition(step_s=0.1)),
        ("round=1s", Condition(round_s=1.0)),
        (" Link=20Mbit + STEP=100ms ", Condition(bandwidth_bytes_per_s=2.5e6, step_s=0.1)),
    ],
)
def test_each_part_means_what_the_design_says(text, condition):
    assert parse(text) == condition


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("fast", "fast"),
        ("step=1000ms+link=0.02gbit", "link=20mbit+step=1s"),
        ("straggler=last:4.0x+straggler=1:2x", "straggler=1:2x+straggler=last:4x"),
        ("slow", "link=20mbit+step=100ms"),
        ("both", "link=20mbit+straggler=last:4x+step=100ms"),
    ],
)
def test_canonical_text_has_one_order_and_one_unit(text, canonical):
    assert str(parse(text)) == canonical


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_their_parts(name):
    assert parse(name) == parse(PRESETS[name])


def test_presets_join_with_parts():
    assert parse("straggler+round=1s") == parse("straggler=last:4x+step=100ms+round=1s")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "a part is empty"),
        ("+", "a part is empty"),
        ("step=100ms+", "a part is empty"),
        ("lnk=20mbit", "Did you mean 'link'?"),
        ("slwo", "Did you mean 'slow'?"),
        ("latency=20ms", "link=100mbit,latency=20ms"),
        ("link", "`link` needs a value. Expected link=20mbit"),
        ("slow=3", "`slow` is a preset and takes no value"),
        ("link=20", "'20' is not a bandwidth"),
        ("link=20mb", "'20mb' is not a bandwidth"),
        ("link=-20mbit", "'-20mbit' is not a bandwidth"),
        ("link=0mbit", "Expected 1kbit to 1000gbit"),
        ("link=5000gbit", "Expected 1kbit to 1000gbit"),
        ("link=20mbit,latncy=2ms", "Did you mean 'latency'?"),
        ("link=20mbit,latency=2ms,latency=2ms", "latency is given twice"),
        ("link=20mbit,latency=0ms", "Expected 1us to 3600s"),
        ("step=100", "'100' is not a duration (a positive decimal number and s or ms or us)"),
        ("step=0ms", "Expected 1us to 3600s"),
        ("step=2h", "'2h' is not a duration"),
        ("step=1e-3s", "'1e-3s' is not a duration"),
        ("step=nans", "'nans' is not a duration"),
        ("step=4000s", "Expected 1us to 3600s"),
        ("round=", "'' is not a duration"),
        ("stall=1s", "Expected stall=1s@1%"),
        ("stall=1s@1", "'1' is not a percentage"),
        ("stall=1s@101%", "Expected 0% to 100%"),
        ("stall=1s@-1%", "'-1%' is not a percentage"),
        ("stall=0s@1%", "Expected 1us to 3600s"),
        ("straggler=3", "Expected straggler=3:4x or straggler=last:4x"),
        ("straggler=3:4", "'4' is not a factor"),
        ("straggler=3:0x", "Expected 1x to 1000x"),
        ("straggler=3:0.5x", "Expected 1x to 1000x"),
        ("straggler=-1:4x", "'-1' is not a rank"),
        ("straggler=first:4x", "'first' is not a rank"),
        ("straggler=٣:4x", "is not a rank"),
        ("straggler=3:4x+straggler=3:2x", "straggler 3 is given twice"),
        ("step=100ms+step=100ms", "`step=` is given twice"),
        ("slow+step=50ms", "`step=` is given twice in 'slow+step=50ms' (presets count)"),
        ("fast+step=100ms", "stands alone"),
    ],
)
def test_bad_text_is_refused_with_the_part_and_what_was_expected(text, shown):
    with pytest.raises(ConfigurationError) as refused:
        parse(text)
    assert shown in str(refused.value)


@given(st.text(alphabet="linkstepragroud=:@%+,.0123456789xms -", max_size=30))
def test_no_text_raises_anything_but_a_configuration_error(text):
    try:
        condition = parse(text)
    except ConfigurationError:
        return
    assert parse(str(condition)) == condition


@pytest.mark.parametrize(
    "fields",
    [
        {"step_s": 0.0},
        {"step_s": float("nan")},
        {"round_s": -1.0},
        {"bandwidth_bytes_per_s": 0.0},
        {"latency_s": 0.02},
        {"stall_probability": 0.5},
        {"stall_s": 1.0, "stall_probability": 1.5},
        {"stragglers": ((0, 0.5),)},
        {"stragglers": ((0, 2.0), (0, 3.0))},
    ],
)
def test_fields_are_checked_when_the_condition_is_made(fields):
    with pytest.raises(ConfigurationError):
        Condition(**fields)


def test_factor_is_one_for_everybody_but_the_stragglers():
    condition = parse("straggler=1:2x+straggler=last:4x")
    assert [condition.factor(rank, 4) for rank in range(4)] == [1.0, 2.0, 1.0, 4.0]


def test_last_follows_the_world_size():
    condition = parse("straggler=last:4x")
    assert condition.factor(3, 4) == condition.factor(7, 8) == 4.0
    assert condition.factor(3, 8) == 1.0


def test_check_passes_for_ranks_that_exist():
    parse("straggler=3:4x+straggler=last:2x").check(8)
    parse("slow").check(1)


def test_check_names_the_rank_that_does_not_exist():
    with pytest.raises(ConfigurationError, match="no rank 4 among 4 ranks"):
        parse("straggler=4:4x").check(4)


def test_check_refuses_a_number_that_is_also_the_last_rank():
    with pytest.raises(ConfigurationError, match="rank 3 is also the last of 4 ranks"):
        parse("straggler=3:4x+straggler=last:2x").check(4)

"""Every kind of tensor a model may hold, averaged where it should be and nowhere else."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lasgd.algorithms.requests import Failure, Mean
from lasgd.errors import ConfigurationError
from lasgd.layout import Layout, Section
from lasgd.replica import Holding, Replica
from lasgd.tally import Tally
from scripted_driver import Point, Ranks, towards, vector


def averaged(models: list[nn.Module], fragments: int = 1) -> Ranks:
    """One cycle of rounds, shown."""
    ranks = Ranks(models, fragments=fragments)
    ranks.cycle()
    ranks.boundary()
    return ranks


def filled(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    return model


def test_tied_weights_are_counted_once_and_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    models = [filled(Tied(), v) for v in (1.0, 3.0)]
    ranks = averaged(models)
    assert ranks.replicas[0].layout.size == 9
    assert models[0].a.weight is models[0].b.weight
    assert torch.equal(models[0].b.weight, torch.full((3, 3), 2.0))
    state = ranks.replicas[0].layout.state_dict(models[0], torch.zeros(9))
    assert state["a.weight"].data_ptr() == state["b.weight"].data_ptr()


def test_frozen_parameters_are_left_alone_bit_for_bit():
    models = [filled(nn.Linear(2, 2), v) for v in (1.0, 3.0)]
    for model in models:
        model.weight.requires_grad_(False)
    ranks = averaged(models)
    assert ranks.replicas[0].layout.size == 2
    assert [m.weight.unique().tolist() for m in models] == [[1.0], [3.0]]
    assert models[0].bias.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_dtype_is_averaged_and_kept(dtype):
    models = [filled(nn.Linear(2, 2).to(dtype), v) for v in (1.0, 2.0)]
    averaged(models)
    assert {p.dtype for p in models[0].parameters()} == {dtype}
    assert vector(models[0]).unique().tolist() == [1.5]


@pytest.mark.parametrize("fragments", [1, 2, 5])
def test_mixed_dtypes_share_one_vector_of_the_finest(fragments):
    def model(v):
        return nn.Sequential(filled(nn.Linear(3, 2).bfloat16(), v), filled(nn.Linear(2, 2), v), nn.BatchNorm1d(2))

    models = [model(1.0), model(1.0078125)]  # neighbours in bf16: their mean is not a bf16 number
    ranks = averaged(models, fragments)
    assert ranks.replicas[0].layout.dtype == torch.float32
    for rank in range(2):
        z = ranks.z(rank)
        within = torch.cat([torch.zeros(e.end - e.begin) + (e.name < "2") for e in ranks.replicas[0].layout.entries])
        assert z[within.bool()].unique().tolist() == [1.00390625]
    assert Layout(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).double()])).dtype == torch.float64


def test_small_bf16_progress_of_many_rounds_is_not_lost_to_rounding():
    models = [Point([1.0], torch.bfloat16), Point([1.0], torch.bfloat16)]
    ranks = Ranks(models)
    for _ in range(8):  # 8 x 1/1024 is one bf16 step at 1; each alone would be rounded away
        ranks.replicas[0]._residual.add_(1 / 1024)
        ranks.replicas[0]._holding = [Holding.REST]
        ranks.round()
        ranks.boundary()
    assert ranks.sum_of_z().item() == pytest.approx(2 + 8 / 1024, abs=1e-6)
    assert {m.x.item() for m in models} == {1.0}  # 4/1024 is half a step: ties to even
    assert ranks.z(0).item() == pytest.approx(1 + 4 / 1024, abs=1e-6)


def test_channels_last_weights_keep_their_strides_and_meet_the_right_elements():
    torch.manual_seed(0)
    a, b = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
    b = b.to(memory_format=torch.channels_last)
    expected = (a.weight.detach() + b.weight.detach()) / 2
    strides, pointer = b.weight.stride(), b.weight.data_ptr()
    averaged([a, b], fragments=3)
    torch.testing.assert_close(b.weight.detach(), expected)
    torch.testing.assert_close(a.weight.detach(), expected)
    assert (b.weight.stride(), b.weight.data_ptr()) == (strides, pointer)


def test_zero_dimensional_parameters_are_averaged():
    models = [Point(1.0), Point(4.0)]
    averaged(models, fragments=3)
    assert [m.x.item() for m in models] == [2.5, 2.5]


def test_one_huge_row_is_never_cut_and_costs_fragments_instead():
    class Huge(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.row = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1, 1000))

    fragments = Layout(Huge()).cut(10)
    assert [f.size for f in fragments if any(p.entry.name == "row" for p in f.pieces)] in ([1000], [1004])
    assert sum(f.size for f in fragments) == 1004


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=6), st.integers(1, 40))
def test_every_cut_covers_every_element_once_along_rows(shapes, fragments):
    model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
    layout = Layout(model)
    cut = layout.cut(fragments)
    assert 1 <= len(cut) <= fragments
    assert [f.index for f in cut] == list(range(len(cut)))
    assert cut[0].begin == 0 and cut[-1].end == layout.size
    assert all(a.end == b.begin for a, b in itertools.pairwise(cut))
    for fragment in cut:
        at = fragment.begin
        for piece in fragment.pieces:
            assert piece.begin == at and piece.live().numel() == piece.end - piece.begin
            at = piece.end
        assert at == fragment.end
    with pytest.raises(ConfigurationError, match="at least 1"):
        layout.cut(0)


def test_more_fragments_than_rows_is_as_many_as_rows():
    assert len(Layout(Point([0.0] * 5)).cut(100)) == 5


def test_parameters_without_elements_are_ignored():
    model = nn.ParameterList([nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(2))])
    assert Layout(model).size == 2


def test_integer_and_non_persistent_buffers_stay_local():
    def model(v):
        module = filled(nn.BatchNorm1d(2), v)
        module.num_batches_tracked.fill_(int(v))
        module.register_buffer("scratch", torch.full((2,), v), persistent=False)
        return module

    models = [model(1.0), model(3.0)]
    averaged(models)
    assert [m.num_batches_tracked.item() for m in models] == [1, 3]
    assert [m.scratch.tolist() for m in models] == [[1.0, 1.0], [3.0, 3.0]]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["forward", "begin", "deliver", "recut"]), st.integers(0, 2)), max_size=40),
    st.integers(0, 100),
)
def test_batchnorm_variance_is_never_negative(schedule, seed):
    # As a correction (x + m - s) a stale variance could go below zero; buffers take the mean itself.
    generator = torch.Generator().manual_seed(seed)
    models = [nn.BatchNorm1d(2, momentum=0.9) for _ in range(3)]
    ranks = Ranks(models, fragments=2)
    under_way = False
    for what, rank in schedule:
        if what == "forward":
            models[rank](torch.randn(4, 2, generator=generator) * torch.rand((), generator=generator) ** 4)
            ranks.step(rank)
        elif what == "begin" and not under_way:
            ranks.begin_round()
            under_way = True
        elif what == "deliver" and under_way:
            ranks.deliver()
            under_way = False
        elif what == "recut":
            for pace in ranks.paces:
                pace.fragments = rank + 1
        assert all((m.running_var >= 0).all() for m in models)


def test_data_rebound_by_the_user_between_rounds_is_followed():
    models = [Point([0.0, 0.0]), Point([4.0, 2.0])]
    ranks = averaged(models)
    with torch.no_grad():
        models[0].x.data = torch.tensor([10.0, 10.0])
    ranks.round()
    ranks.boundary()
    assert vector(models[0]).tolist() == vector(models[1]).tolist() == [6.0, 5.5]


def test_buffers_replaced_by_the_model_itself_are_followed():
    models = [nn.BatchNorm1d(1), nn.BatchNorm1d(1)]
    ranks = averaged(models)
    models[0].running_mean = torch.tensor([8.0])
    ranks.round()
    ranks.boundary()
    assert models[1].running_mean.item() == 4.0


def test_what_cannot_be_averaged_is_refused_by_name():
    for model, words in (
        (nn.LazyLinear(3), "'weight' is lazy"),
        (nn.Sequential(nn.LazyBatchNorm1d(affine=False), nn.Linear(1, 1)), "'0.running_mean' is lazy"),
        (nn.Linear(2, 2, dtype=torch.complex64), "'weight' is torch.complex64"),
        (nn.Linear(2, 2, device="meta"), "device meta"),
        (nn.ModuleList([nn.Linear(2, 2, device="meta"), nn.Linear(2, 2)]), r"2 devices \(cpu, meta\)"),
        (nn.ReLU(), "no trainable"),
        (nn.Linear(2, 2).requires_grad_(False), "no trainable"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            Layout(model)


def test_staleness_counts_local_steps_from_the_snapshot_to_the_merge():
    ranks = Ranks([Point([0.0]), Point([2.0])])
    ranks.round()
    ranks.step(0)
    assert (ranks.tallies[0].staleness.merges, ranks.tallies[0].staleness.total_steps) == (1, 1)
    ranks.begin_round()
    for _ in range(3):
        ranks.step(0)
    ranks.deliver()
    ranks.step(0)
    assert (ranks.tallies[0].staleness.merges, ranks.tallies[0].staleness.max_steps) == (2, 4)


def test_staleness_does_not_grow_where_each_round_begins_before_the_last_mean_is_shown():
    # 1. m arrives within a local step;  2. the next snapshot is taken at once;  3. the boundary shows m;  and again
    ranks = Ranks([Point([0.0]), Point([2.0])])
    ranks.begin_round()
    for _ in range(20):
        ranks.step(0)
        ranks.deliver()
        ranks.begin_round()
    ranks.step(0)
    staleness = ranks.tallies[0].staleness
    assert (staleness.merges, staleness.mean_steps, staleness.max_steps) == (20, 2.0, 2)


def test_a_cut_anew_counts_no_staleness_for_what_has_been_shown_already():
    ranks = Ranks([Point([0.0] * 8), Point([2.0] * 8)], fragments=4)
    for _ in range(8):
        ranks.round()
        ranks.boundary()
    assert ranks.tallies[0].staleness.merges == 8
    for pace in ranks.paces:
        pace.fragments = 2
    ranks.round()
    ranks.boundary()
    assert (ranks.tallies[0].staleness.merges, ranks.tallies[0].staleness.max_steps) == (9, 1)


def test_a_cut_anew_joins_what_is_shown_and_what_is_not_without_showing_anything_twice():
    ranks = Ranks([Point([0.0] * 4), Point([8.0] * 4)], fragments=2)
    ranks.round()
    ranks.boundary()  # the first half is shown, its residual is spent
    ranks.round()  # the second half is not
    for pace in ranks.paces:
        pace.fragments = 1
    total = ranks.sum_of_z()
    ranks.begin_round()
    assert [s.tolist() for s in ranks.sent] == [[4.0] * 4] * 2
    assert torch.equal(ranks.sum_of_z(), total)
    ranks.boundary()
    assert [vector(m).tolist() for m in ranks.models] == [[4.0] * 4] * 2


def test_a_cut_anew_sends_the_buffers_own_values_where_no_mean_is_to_be_shown():
    models = [nn.BatchNorm1d(2) for _ in range(2)]
    ranks = Ranks(models, fragments=2)  # parameters, then buffers
    ranks.cycle()
    ranks.boundary()
    ranks.round()  # the parameters' mean is still to be shown
    for model in models:
        model.running_mean.fill_(5.0)  # a local forward pass
    ranks.begin_round()
    ranks.fail(RuntimeError("lost"))
    for pace in ranks.paces:
        pace.fragments = 1
    ranks.begin_round()
    assert ranks.sent[0].tolist() == [1.0, 1.0, 0.0, 0.0, 5.0, 5.0, 1.0, 1.0]


def test_a_merge_finds_the_lock_taken_and_shows_at_the_next_boundary_instead():
    # 1. a correction has arrived;  2. the communicator holds the lock;  3. the boundary comes and does not wait.
    ranks = Ranks([Point([0.0]), Point([2.0])])
    ranks.round()
    replica = ranks.replicas[0]
    with replica._lock:
        ranks.step(0)
        assert vector(ranks.models[0]).item() == 0.0
        assert replica.deferred_merges == 1
    ranks.step(0)
    assert vector(ranks.models[0]).item() == 1.0
    assert ranks.tallies[0].staleness.max_steps == 2


def test_the_residual_survives_saving_and_loading():
    ranks = Ranks([Point([0.0] * 4), Point([2.0] * 4)], fragments=2)
    ranks.round()  # a correction that is not shown yet
    saved = ranks.replicas[0].wait_residual(1.0)
    assert saved.tolist() == [1.0, 1.0, 0.0, 0.0]
    again = Ranks([Point(vector(m)) for m in ranks.models], fragments=2)
    for old, new in zip(ranks.replicas, again.replicas, strict=True):
        new.load_residual(old.wait_residual(1.0))
    assert torch.equal(again.sum_of_z(), ranks.sum_of_z())
    again.cycle()
    again.boundary()
    assert [vector(m).tolist() for m in again.models] == [[1.0] * 4] * 2
    with pytest.raises(ConfigurationError, match="4 elements"):
        Replica(Point([0.0] * 5), Tally(1)).load_residual(saved)


@pytest.mark.parametrize("fragments", [1, 4])
def test_no_round_allocates_after_the_first_cycle(fragments):
    torch.manual_seed(0)
    # Torch casts a coarser parameter in a temporary of that tensor's size; where all have one dtype there is none.
    models = [nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Conv2d(16, 32, 3)) for _ in range(2)]
    ranks = Ranks(models, fragments=fragments)
    replica = ranks.replicas[0]
    ranks.cycle()
    ranks.boundary()
    mean = torch.zeros(replica.layout.size)
    with torch.profiler.profile(profile_memory=True) as profile:
        for _ in range(2 * fragments):
            fragment = replica.next_fragment(fragments)
            sent = replica.snapshot(fragment)
            replica.correct(fragment, sent, Mean(mean[fragment.begin : fragment.end], torch.zeros(1)))
            replica.merge()
    largest = max((e.self_cpu_memory_usage for e in profile.events()), default=0)
    assert largest <= 64  # a flag and a norm, no tensor of the model's size (35 kB)


def test_extra_memory_is_the_residual_and_two_buffers_of_a_fragment():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(100, 100) for _ in range(10)])
    for fragments in (1, 5):
        replica = Replica(model, Tally(1), fragments)
        held = replica._residual.nbytes + replica._buffer.nbytes
        largest = max(f.size for f in replica.fragments) * 4  # the communicator holds one more of these
        parameters = replica.layout.parameter_bytes
        assert held + largest <= (1 + 2 / fragments) * parameters * 1.01


def test_content_digest_does_not_depend_on_strides_but_on_every_bit():
    torch.manual_seed(0)
    a = nn.Conv2d(3, 4, 3)
    b = nn.Conv2d(3, 4, 3)
    b.load_state_dict(a.state_dict())
    b = b.to(memory_format=torch.channels_last)
    assert Layout(a).content_digest() == Layout(b).content_digest()
    with torch.no_grad():
        b.bias[0] = torch.nextafter(b.bias[0], torch.tensor(10.0))
    assert Layout(a).content_digest() != Layout(b).content_digest()
    ranks = Ranks([a, b])
    ranks.step(0, towards(0.0))


# Memory that tensors share


class Pair(nn.Module):
    """Two parameters in memory that the test chooses."""

    def __init__(self, first: Tensor, second: Tensor):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
        self.first.data, self.second.data = first, second


def test_parameters_that_are_the_same_memory_are_tied_and_averaged_once():
    memory = torch.arange(6.0).view(2, 3)
    model = Pair(memory, memory)
    layout = Layout(model)
    assert [(entry.name, entry.begin, entry.end) for entry in layout.entries] == [("first", 0, 6)]
    state = layout.state_dict(model, torch.full((6,), 7.0))
    assert torch.equal(state["second"], torch.full((2, 3), 7.0)) and state["second"] is state["first"]


def test_parameters_that_lie_side_by_side_in_one_memory_are_two():
    memory = torch.arange(6.0)
    assert Layout(Pair(memory[:2], memory[2:])).size == 6


@pytest.mark.parametrize("second", [slice(1, 4), slice(0, 2)], ids=["shifted", "shorter"])
def test_parameters_that_share_a_part_of_their_memory_are_refused(second):
    memory = torch.arange(6.0)
    with pytest.raises(ConfigurationError, match=r"'(first|second)' and '(first|second)' share a part"):
        Layout(Pair(memory[:3], memory[second]))


def test_an_expanded_buffer_is_refused_by_name():
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.ones(1).expand(5))
    with pytest.raises(ConfigurationError, match=r"'scale' \(5,\) is expanded"):
        Layout(model)


def test_a_float64_buffer_does_not_double_the_vector():
    model = nn.Linear(2, 2)
    model.register_buffer("seen", torch.tensor(3.0, dtype=torch.float64))
    layout = Layout(model)
    assert layout.dtype == torch.float32
    assert [entry.section for entry in layout.entries] == [Section.EXACT, Section.EXACT, Section.BUFFER]
    replica = Replica(model, Tally(1))
    sent = replica.snapshot(replica.next_fragment(1))
    replica.correct(replica.fragments[0], sent, Mean(sent.values + 1, torch.empty(0)))
    replica.merge()
    assert model.seen.dtype == torch.float64 and model.seen.item() == 4.0


def test_a_parameter_that_is_renamed_after_attach_is_named_in_the_error():
    model = nn.Linear(2, 2)
    replica = Replica(model, Tally(1))
    torch.nn.utils.parametrizations.weight_norm(model)
    with pytest.raises(ConfigurationError, match="'weight' has been renamed or removed"):
        replica.snapshot(replica.next_fragment(1))


# Gradients, for algorithms that average them


class Mixed(nn.Module):
    """A parameter of each precision, one that has no gradient, and a buffer."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.coarse = nn.Parameter(torch.tensor([3.0], dtype=torch.bfloat16))
        self.unused = nn.Parameter(torch.tensor([4.0]))
        self.register_buffer("seen", torch.tensor([5.0]))


def test_gradients_travel_whole_with_zeros_for_missing_ones_and_the_buffers_behind():
    model = Mixed()
    model.fine.grad, model.coarse.grad = torch.tensor([0.5, -0.5]), torch.tensor([2.0], dtype=torch.bfloat16)
    replica = Replica(model, Tally(1))
    sent = replica.gradient()
    assert sent.is_gradient and sent.weight == 1.0
    assert sent.values.tolist() == [0.5, -0.5, 0.0, 2.0, 5.0]  # fine, unused, coarse, buffer
    replica.set_gradient(Mean(torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0]), torch.empty(0)))
    assert model.fine.grad.tolist() == [1.0, 2.0]
    assert model.unused.grad.tolist() == [3.0]
    assert (model.coarse.grad.dtype, model.coarse.grad.item()) == (torch.bfloat16, 4.0)
    assert model.seen.tolist() == [6.0]
    assert model.fine.tolist() == [1.0, 2.0], "parameters are the optimizer's"


def test_a_gradient_that_is_not_finite_counts_with_weight_zero_and_is_replaced():
    model = Mixed()
    model.fine.grad = torch.tensor([float("inf"), 0.0])
    replica = Replica(model, Tally(1))
    sent = replica.gradient()
    assert (sent.weight, sent.values.abs().sum().item()) == (0.0, 0.0)
    replica.set_gradient(Mean(torch.ones(5), torch.empty(0)))
    assert model.fine.grad.tolist() == [1.0, 1.0]


def test_a_failed_round_leaves_the_gradients_as_they_are():
    model = Mixed()
    model.fine.grad = torch.tensor([0.5, -0.5])
    replica = Replica(model, Tally(1))
    replica.gradient()
    replica.set_gradient(Failure(RuntimeError("lost")))
    assert model.fine.grad.tolist() == [0.5, -0.5] and model.unused.grad is None


def test_an_adopted_average_is_shown_bit_for_bit_and_the_next_snapshot_is_of_the_replica_again():
    model = Point([0.1, 0.2, 0.3])
    replica = Replica(model, Tally(1))
    fragment = replica.next_fragment(1)
    replica.snapshot(fragment)
    mean = torch.tensor([1 / 3, 2 / 3, 1.0])
    replica.adopt(fragment, Mean(mean, torch.empty(0)))
    replica.show_average()
    assert torch.equal(model.x, mean)
    with torch.no_grad():
        model.x += 1  # a local step
    assert torch.equal(replica.snapshot(fragment).values, model.x)
    assert replica.deferred_merges == 0

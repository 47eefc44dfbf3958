"""What is attached to a network changes its answer while it is attached, in the order of ranks, and leaves no trace."""

import gc
import weakref

import pytest
import torch
from keyed import keyed_input
from torch import nn

from ldm.errors import UsageError
from ldm.modules import seams
from ldm.modules.seams import Change, Execution, Rank, attached, on


class Slotted(nn.Linear):
    processor = None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = Slotted(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(self.first(x))


seams.register(Net, Slotted, nn.Linear)


class Weights:
    """A change of weights, as a LoRA is one."""

    rank = Rank.WEIGHTS

    def __init__(self, **by_name):
        self.by_name = {name.replace("_", "."): Change(apply) for name, apply in by_name.items()}

    def changes(self, network):
        return self.by_name

    def at(self, step):
        pass


class Around:
    def __init__(self, rank, note):
        self.rank, self.note = rank, note

    def attach(self, network):
        return seams.wrap(network, self.call)

    def call(self, proceed, x):
        self.note.append(self)
        return proceed(x)

    def at(self, step):
        pass

    def state(self):
        return ("around",)


@pytest.fixture
def net():
    made = Net()
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(keyed_input(f"seams.{name}", tuple(p.shape)))
    return made.requires_grad_(False)


def trace_of(net):
    return {name: id(p) for name, p in net.named_parameters()}, [dict(vars(m)) for m in net.modules()]


X = keyed_input("seams.x", (4, 3))


def test_changes_of_a_weight_fold_in_the_order_given_and_leave_the_old_object(net):
    before, answer = trace_of(net), net(X)
    double, more = Weights(first_weight=lambda w: 2 * w), Weights(first_weight=lambda w: w + 3)
    old = net.first.weight
    for order, want in (((double, more), 2 * old + 3), ((more, double), 2 * (old + 3))):
        with attached(net, *order):
            assert torch.equal(net.first.weight, want) and net.first.weight is not old
            assert not torch.equal(net(X), answer)
        assert trace_of(net) == before and torch.equal(net(X), answer)


def test_changes_are_computed_in_float32_and_rounded_once():
    layer = nn.Linear(3, 5, bias=False).half().requires_grad_(False)
    third = Weights(weight=lambda w: w / 3)
    seen = []
    back = Weights(weight=lambda w: seen.append(w.dtype) or w * 3)
    with attached(layer, third, back):
        got = layer.weight.clone()
    assert seen == [torch.float32] and got.dtype == torch.float16
    assert torch.equal(got, layer.weight)  # two roundings to half would lose bits of some


def test_a_folded_weight_is_made_once_for_each_combination_and_goes_with_its_changes(net):
    asked = []
    one, two = (Weights(first_weight=lambda w, i=i: asked.append(i) or w + i) for i in (1, 2))
    made = []
    for present in ((one,), (), (one,), (one, two), (one,), (one, two)):
        with attached(net, *present):
            made.append(weakref.ref(net.first.weight))
    assert asked == [1, 1, 2] and made[0]() is made[2]() is not made[3]()
    folded = made[3]
    del one, two, present
    gc.collect()
    assert folded() is None


def test_a_weight_that_was_written_to_is_folded_anew(net):
    more = Weights(first_weight=lambda w: w + 1)
    with attached(net, more):
        pass
    net.first.weight.zero_()
    with attached(net, more):
        assert net.first.weight.unique().tolist() == [1.0]


def test_a_whole_weight_is_used_as_it_is_and_folded_where_something_follows(net):
    whole = nn.Parameter(torch.full((5, 3), 7.0), requires_grad=False)
    average = Weights()
    average.by_name["first.weight"] = Change(lambda w: whole.to(w), whole)
    with attached(net, average):
        assert net.first.weight is whole
    with attached(net, average, Weights(first_weight=lambda w: w + 1)):
        assert net.first.weight.unique().tolist() == [8.0]
    half = Net().half()
    with attached(half, average):
        assert half.first.weight.dtype == torch.float16


def test_the_layout_of_a_weight_stays():
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    with attached(conv, Weights(weight=lambda w: w.contiguous() * 2)):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_ranks_decide_who_is_outside(net):
    note = []
    shortcut, residual = Around(Rank.SHORTCUTS, note), Around(Rank.RESIDUALS, note)
    for given in ((shortcut, residual), (residual, shortcut)):
        note.clear()
        with attached(net, *given):
            net(X)
        assert note == [shortcut, residual]


def test_whatever_fails_all_is_taken_off(net):
    before = trace_of(net)

    class Failing(Around):
        def attach(self, network):
            raise ValueError("no")

    note = []
    with (
        pytest.raises(ValueError, match="no"),
        attached(
            net,
            Weights(first_weight=lambda w: w + 1),
            Around(Rank.RESIDUALS, note),
            Failing(Rank.SHORTCUTS, note),
        ),
    ):
        raise AssertionError("not reached")
    assert trace_of(net) == before
    with pytest.raises(KeyError), attached(net, Weights(first_weight=lambda w: w + 1)):
        raise KeyError("within")
    assert trace_of(net) == before


def test_what_somebody_replaced_meanwhile_stays_and_is_said(net):
    theirs = nn.Parameter(torch.zeros(5, 3))
    with pytest.raises(UsageError, match="the weight of a Slotted was replaced") as told:
        with attached(net, Weights(first_weight=lambda w: w + 1, last_weight=lambda w: w + 1)):
            inside = net.last.weight
            net.first.weight = theirs
    assert net.first.weight is theirs and net.last.weight is not inside
    assert told.value.exit_code == 2


def test_of_an_attachment_on_several_modules_the_others_go_where_one_was_replaced_meanwhile(net):
    class Several(Around):
        def attach(self, network):
            return seams.undo_all([seams.fill(one, "note", self) for one in (network.first, network.last)])

    for one in (net.first, net.last):
        one.note = None
    before = trace_of(net)
    with pytest.raises(UsageError, match="the note of a Linear was replaced"):
        with attached(net, Several(Rank.ATTENTION, [])):
            net.last.note = "theirs"
    assert net.last.note == "theirs"
    net.last.note = None
    assert trace_of(net) == before


def test_a_slot_is_no_part_of_a_module(net):
    keys = list(net.state_dict())
    undo = seams.fill(net.first, "processor", nn.Linear(2, 2))
    assert list(net.state_dict()) == keys and len(list(net.modules())) == 3
    undo()
    assert "processor" not in vars(net.first) and net.first.processor is None
    with pytest.raises(UsageError, match="a Linear has no slot 'processor'"):
        seams.fill(net.last, "processor", None)


class Stateless:
    def __call__(self, *args):
        pass


class Stated(Stateless):
    def state(self):
        return ("stated", 5)


def test_on_tells_plain_from_known_from_foreign(net, monkeypatch):
    first = net.first
    assert on(net) is on(first) is seams.PLAIN

    first.forward = Execution()
    assert on(first) is seams.PLAIN  # optimize() changes no answer
    undo = seams.wrap(first, Around(Rank.SHORTCUTS, []).call)
    assert on(first) == ("known", (("around",),), "") and isinstance(seams.execution_of(first), Execution)
    undo()
    del first.forward

    for value, state in ((Stated(), (("stated", 5),)), (Stateless(), None)):
        undo = seams.fill(first, "processor", value)
        kind, got, reason = on(first)
        assert (kind, got) == ("known", state) and ("Stateless" in reason) == (state is None)
        undo()
    assert on(first) is seams.PLAIN

    for hook in (first.register_forward_hook, first.register_forward_pre_hook):
        handle = hook(Stateless())
        assert on(first).kind == "foreign" and "Stateless" in on(first).reason
        handle.remove()
    first.forward = lambda x: x
    assert on(first).kind == "foreign"
    del first.forward
    monkeypatch.setattr(Slotted, "forward", lambda self, x: x)
    assert on(first).kind == "foreign" and on(net) is seams.PLAIN
    assert on(nn.Bilinear(1, 1, 1)).kind == "foreign"  # nobody said that it is known


def test_a_loss_of_speed_is_said_once_for_each_reason(caplog):
    seams.forget_said()
    for loss, reason in (("no graph", "a hook"), ("no graph", "a hook"), ("no graph", "a patch")):
        seams.say_once(loss, reason)
    assert caplog.messages == ["no graph: a hook", "no graph: a patch"]
    seams.forget_said()
    seams.say_once("no graph", "a hook")
    assert len(caplog.messages) == 3

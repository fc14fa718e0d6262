"""Wrapping methods: order, arguments by name, removal, and the list of what is wrapped."""

import functools
import types

import pytest
import torch

from megatron_moe_inject.host.contract import Wrapped
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.wrap import wrap_method, wrap_of, wraps_of
from megatron_moe_inject.host.wrap_list import InPlace, wrapped_in

ROUTING = Wrapped("a.Router.routing", ("logits", "padding_mask"))
HERE = __name__


class Router:
    def routing(self, logits, padding_mask=None, *, scale=1):
        """Stock's."""
        return (logits, padding_mask, scale)


class Dispatcher:
    def dispatch(self, probs):
        return probs


class Part(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.token_dispatcher = Dispatcher()

    def forward(self, hidden):
        return hidden


class Chunk(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = torch.nn.Module()
        layer = torch.nn.Linear(1, 1)
        layer.layer_number = 1
        self.decoder.layers = torch.nn.ModuleList([layer])

    def forward(self, labels=None, output_processor=None):
        """As GPTModel's."""


def adding(name, log):
    def around(call):
        log.append(name)
        return call()

    return around


def test_the_last_wrapper_is_the_outermost_and_each_can_go():
    router, log = Router(), []
    inner = wrap_method(router, ROUTING, adding("inner", log))
    middle = wrap_method(router, ROUTING, adding("middle", log))
    outer = wrap_method(router, ROUTING, adding("outer", log))
    assert list(wraps_of(router, "routing")) == [outer, middle, inner]
    assert router.routing.__doc__ == "Stock's."
    router.routing(1)
    assert log == ["outer", "middle", "inner"]
    for wrap, left in ((middle, ["outer", "inner"]), (outer, ["inner"]), (inner, [])):
        wrap.remove()
        wrap.remove()
        log.clear()
        assert router.routing(1) == (1, None, 1)
        assert log == left
    assert "routing" not in vars(router)


def test_a_wrapper_that_is_there_is_not_put_on_again():
    router = Router()

    class Watch:
        def around(self, call):
            return call()

    watch = Watch()
    first = wrap_method(router, ROUTING, watch.around)
    assert wrap_method(router, ROUTING, watch.around) is first
    assert wrap_method(router, ROUTING, Watch().around) is not first
    assert len(list(wraps_of(router, "routing"))) == 2


@pytest.mark.parametrize("call", [lambda f: f(1, 2), lambda f: f(logits=1, padding_mask=2)])
def test_arguments_are_read_and_changed_by_name_however_they_are_passed(call):
    router, seen = Router(), []

    def around(call):
        seen.append((call["logits"], call["padding_mask"]))
        assert call() == (1, 2, 1)
        return call(logits=5, padding_mask=6)

    wrap_method(router, ROUTING, around)
    assert call(router.routing) == (5, 6, 1)
    assert seen == [(1, 2)]


def test_what_is_not_passed_has_its_default_and_other_arguments_go_through():
    router = Router()
    wrap_method(router, ROUTING, lambda call: (call["padding_mask"], call(padding_mask=7)))
    assert router.routing(1, scale=3) == (None, (1, 7, 3))
    wrap_method(router, ROUTING, lambda call: call["logits"])
    with pytest.raises(TypeError, match=r"Router\.routing: logits is missing"):
        router.routing()


def test_a_call_can_go_to_another_function():
    router = Router()
    wrap_method(router, ROUTING, lambda call: call.of(lambda logits, mask: logits - mask, logits=9))
    assert router.routing(1, 2) == 7


def test_only_what_the_row_names_is_read():
    router = Router()
    wrap_method(router, Wrapped("a.Router.routing", ("logits",)), lambda call: call["padding_mask"])
    with pytest.raises(KeyError, match="padding_mask"):
        router.routing(1, 2)


def test_what_lacks_a_parameter_cannot_be_wrapped():
    class Renamed:
        def routing(self, scores, padding_mask=None):
            return scores

    renamed = Renamed()
    with pytest.raises(RecipeError) as error:
        wrap_method(renamed, ROUTING, adding("", []))
    assert "Renamed.routing(scores, padding_mask) has no parameter logits, which " in str(
        error.value
    )
    assert vars(renamed) == {}
    renamed.routing = lambda *args, **kwargs: None  # another tool's, which tells nothing
    with pytest.raises(RecipeError, match="no parameter logits and no padding_mask"):
        wrap_method(renamed, ROUTING, adding("", []))


def test_an_attribute_of_the_object_itself_comes_back():
    router = Router()
    router.routing = patched = lambda logits, padding_mask: "patched"
    wrap = wrap_method(router, ROUTING, adding("", []))
    assert router.routing(1, 2) == "patched"
    wrap.remove()
    assert router.routing is patched


def test_what_others_wrapped_is_left_alone():
    router = Router()
    wrap = wrap_method(router, ROUTING, adding("ours", log := []))
    ours = router.routing

    @functools.wraps(ours)
    def theirs(*args, **kwargs):
        log.append("theirs")
        return ours(*args, **kwargs)

    router.routing = theirs
    assert wrap_of(router.routing) is None, "a mark that was copied"
    with pytest.raises(RuntimeError, match=r"Router\.routing: wrapped or replaced"):
        wrap.remove()
    router.routing(1)
    assert log == ["theirs", "ours"]


def test_functions_of_modules_and_methods_of_classes():
    module = types.ModuleType("place")
    module.train = stock = lambda model: model
    wrap = wrap_method(module, Wrapped("place.train", ("model",)), lambda call: call(model=2))
    assert module.train(1) == 2
    wrap.remove()
    assert module.train is stock

    class Attention:
        def forward(self, query):
            return self, query

    forward = Wrapped("a.Attention.forward", ("self", "query"))
    wrap = wrap_method(
        Attention, forward, lambda call: (call["self"], call(query=call["query"] + 1))
    )
    one = Attention()
    assert one.forward(1) == (one, (one, 2))
    wrap_method(one, Wrapped("a.Attention.forward", ("query",)), lambda call: call()[1])
    assert one.forward(query=4) == (one, 5)
    wrap.remove()
    assert Attention().forward(1)[1] == 1


def test_all_that_is_wrapped_in_a_model_and_an_optimizer_is_listed():
    def around(call):
        return call()

    model = torch.nn.Sequential(Part(), Part())
    for part in (*model, *model):  # a partial is another one each time
        wrap_method(part, Wrapped("a.Part.forward", ("hidden",)), functools.partial(around))
    wrap_method(model[1].token_dispatcher, Wrapped("a.Dispatcher.dispatch", ("probs",)), around)
    inner = torch.optim.SGD([torch.zeros(1)])
    wrap_method(inner, Wrapped("a.SGD.state_dict"), around)
    optimizer = types.SimpleNamespace(optimizer=inner)
    chain = types.SimpleNamespace(chained_optimizers=[optimizer, optimizer])
    model[0].register_forward_hook(lambda *_: None)
    assert sorted(wrapped_in([model, chain, None])) == [
        InPlace("Dispatcher.dispatch", HERE),
        *[InPlace("Part.forward", HERE)] * 4,
        InPlace("SGD.state_dict", HERE),
    ]


def test_hooks_of_this_package_are_listed_and_others_are_not():
    from megatron_moe_inject.host.clock import ChunkClock
    from megatron_moe_inject.host.finite import FiniteWatch
    from megatron_moe_inject.host.loss_seam import LossSeam
    from megatron_moe_inject.host.student_load import StudentLoad

    chunk = Chunk()
    chunk.register_forward_hook(lambda *_: None)
    ChunkClock(chunk)
    LossSeam(chunk)
    FiniteWatch().see_layers([chunk])
    load = StudentLoad.__new__(StudentLoad)
    load._chunks = []
    load.watch([chunk])
    assert sorted(tuple(at) for at in wrapped_in([chunk])) == [
        ("Chunk forward hook", "host.clock"),
        ("Chunk forward pre-hook", "host.clock"),
        ("Chunk forward pre-hook", "host.loss_seam"),
        ("Chunk load_state_dict post-hook", "host.student_load"),
        ("Linear forward hook", "host.finite"),
    ]

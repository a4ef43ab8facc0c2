import pytest
import torch
from models import measured, model_of

from tersor.core.errors import InputError, UnknownName
from tersor.formats import format_named
from tersor.nn.connections.connection import Connection, find_connections
from tersor.transforms.awq import Awq, output_error


def test_salient_columns_are_scaled_up():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 64, generator=generator), torch.randn(48, 64, generator=generator)
    x[:, 7] *= 50
    pair, format = Connection("norm", ("linear",), 64), format_named("int3-g32")
    factor = Awq().factor(pair, [weight], x, format)
    assert factor.argmax() == 7
    assert output_error(x, weight, format, factor, pair) < 0.5 * output_error(x, weight, format, None, pair)


def test_no_layer_gets_worse_on_its_sample():
    model, format = model_of("qwen3"), format_named("int2-g32")
    stats = measured(model, "qwen3")
    for pair in find_connections(model):
        weights = [model.get_submodule(path).weight.detach().float() for path in pair.readers]
        x = stats[pair.readers[0]].sample
        factor = Awq("int2-g32").factor(pair, weights, x, format)
        before, after = (sum(output_error(x, w, format, f, pair) for w in weights) for f in (None, factor))
        assert after <= before


def test_bad_options_are_refused():
    with pytest.raises(InputError, match="num_steps=0"):
        Awq(num_steps=0)
    with pytest.raises(UnknownName, match="int4-g64"):
        Awq(format="int4-g63")

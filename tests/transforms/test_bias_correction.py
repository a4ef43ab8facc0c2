import torch
import torch.nn.functional as F

from tersor.formats.int_group import IntGroup
from tersor.transforms.bias_correction import corrected_bias


def test_the_mean_output_is_that_of_the_original():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 32, generator=generator).relu()
    weight, bias = torch.randn(8, 32, generator=generator), torch.randn(8, generator=generator)
    rough = IntGroup(2).snap(weight, IntGroup(2).fit(weight))
    mean = F.linear(x, weight, bias).mean(0)
    new_bias = corrected_bias(bias, rough - weight, x.mean(0))
    assert new_bias.dtype is bias.dtype
    assert (F.linear(x, rough, bias).mean(0) - mean).abs().max() > 0.1
    torch.testing.assert_close(F.linear(x, rough, new_bias).mean(0), mean, rtol=1e-4, atol=1e-5)

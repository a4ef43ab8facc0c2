"""HQQ: the promise of the paper (a lower l_p error on heavy tails), and agreement with a slow version."""

import numpy as np
import pytest
import torch

from laws import random, same_parts
from tersor.formats import int_group
from tersor.formats.int_group import IntGroup
from tersor.methods import Hqq, Nearest
from tersor.methods.stats import Stats


def heavy_tailed():
    """Student's t with three degrees of freedom, about what trained weights look like."""
    return 0.02 * random(32, 256) / sum(random(32, 256, seed=s).square() for s in (1, 2, 3)).div(3).sqrt()


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("group_size", [32, 64, None])
def test_lowers_the_lp_error_in_every_group(bits, group_size):
    weight, format = heavy_tailed(), IntGroup(bits, group_size, symmetric=False)
    hqq, nearest = (
        format.grouped((method.compress(weight, format, Stats()).decode() - weight).abs().pow(0.7)).sum(-1)
        for method in (Hqq(), Nearest())
    )
    assert (hqq <= nearest * (1 + 1e-5)).all()
    assert hqq.mean() < (0.99 if group_size else 0.996) * nearest.mean()


def textbook(weights, format, p=0.7, beta=2.0, kappa=1.05, num_iterations=20):
    """One group, one number at a time in float64: the scale, and the code of the best zero point."""
    levels = 2**format.bits
    low, high = min(min(weights), 0.0), max(max(weights), 0.0)
    scale = float(np.float16((high - low) / (levels - 1)))
    code = min(max(round(-low / scale * 256 / levels), 0), 255)
    best_code, lowest = code, float("inf")
    for _ in range(num_iterations):
        zero_point = code * levels / 256
        q = [min(max(round(w / scale + zero_point), 0), levels - 1) for w in weights]
        errors = [w / scale - (c - zero_point) for w, c in zip(weights, q, strict=True)]
        loss = sum(abs(e) ** p for e in errors)
        if loss < lowest:
            best_code, lowest = code, loss
        shrunk = [np.sign(e) * max(abs(e) - max(abs(e), 1e-8) ** (p - 1) / beta, 0) for e in errors]
        moved = [c - w / scale + s for w, c, s in zip(weights, q, shrunk, strict=True)]
        code = min(max(round(sum(moved) / len(moved) * 256 / levels), 0), 255)
        beta *= kappa
    return scale, best_code


@pytest.mark.parametrize("options", [{}, {"p": 0.5, "beta": 3.0, "kappa": 1.2, "num_iterations": 12}], ids=str)
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_agrees_with_the_textbook(bits, options):
    weight, format = heavy_tailed()[:6], IntGroup(bits, 64, symmetric=False)
    parts = Hqq(**options).compress(weight, format, Stats()).parts
    for row in range(6):
        for group in range(4):
            scale, code = textbook(weight[row, 64 * group : 64 * group + 64].tolist(), format, **options)
            assert parts["scale"][row, group] == scale
            assert parts["zero_point"][row, group] == code


def test_keeps_the_plain_scale():
    weight, format = heavy_tailed(), IntGroup(4, 64, symmetric=False)
    parts = [method.compress(weight, format, Stats()).parts["scale"] for method in (Hqq(), Nearest())]
    assert (parts[0] == parts[1]).all()


def test_rows_at_a_time_or_all_at_once(monkeypatch):
    weight, format = heavy_tailed(), IntGroup(3, 64, symmetric=False)
    whole = Hqq().compress(weight, format, Stats()).parts
    monkeypatch.setattr(int_group, "CHUNK", 1000)
    assert same_parts(Hqq().compress(weight, format, Stats()).parts, whole)


def test_a_shorter_last_group_is_a_group_of_its_own():
    """576 = 4.5 x 128: the last 64 columns get what they would get alone."""
    weight, format = random(8, 576, seed=5), IntGroup(3, 128, symmetric=False)
    whole = Hqq().compress(weight, format, Stats()).decode()
    parts = [Hqq().compress(columns, format, Stats()).decode() for columns in (weight[:, :512], weight[:, 512:])]
    assert torch.equal(whole, torch.cat(parts, dim=1))

"""The losses of distillation against slow textbook versions, and what their papers promise."""

import math

import pytest
import torch

from tersor.training.losses import cosine, dkd, kd, mse, skew_kl, skew_reverse_kl, top_and_tail


def softmax(logits, temperature):
    exps = [math.exp(z / temperature) for z in logits]
    return [e / sum(exps) for e in exps]


def textbook_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.fixture
def pair():
    return 3 * torch.randn(6, 5, dtype=torch.float64), 3 * torch.randn(6, 5, dtype=torch.float64)


def by_hand(pair, formula):
    return torch.tensor([formula(s.tolist(), t.tolist()) for s, t in zip(*pair, strict=True)], dtype=torch.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_against_the_formulas(pair, temperature):
    square = temperature**2

    def probabilities(student, teacher):
        return softmax(teacher, temperature), softmax(student, temperature)

    def skewed(first, second):
        return [0.3 * a + 0.7 * b for a, b in zip(first, second, strict=True)]

    def hinton(student, teacher):
        return square * textbook_kl(*probabilities(student, teacher))

    def forward(student, teacher):
        p, q = probabilities(student, teacher)
        return square * textbook_kl(p, skewed(p, q))

    def reverse(student, teacher):
        p, q = probabilities(student, teacher)
        return square * textbook_kl(q, skewed(q, p))

    torch.testing.assert_close(kd(*pair, temperature), by_hand(pair, hinton))
    torch.testing.assert_close(skew_kl(*pair, temperature, 0.3), by_hand(pair, forward))
    torch.testing.assert_close(skew_reverse_kl(*pair, temperature, 0.3), by_hand(pair, reverse))


@pytest.mark.parametrize("num_classes", [2, 5])
def test_dkd_against_its_formula_and_as_the_parts_of_kd(num_classes):
    """Zhao et al., equation 7: KD = TCKD + (1 - p_target) NCKD."""
    pair = 3 * torch.randn(6, num_classes), 3 * torch.randn(6, num_classes)
    target, temperature = torch.tensor([0, 1, 1, 0, 1, 0]), 2.0

    def parts(student, teacher, k):
        p, q = softmax(teacher, temperature), softmax(student, temperature)
        others = [i for i in range(num_classes) if i != k]
        target_part = textbook_kl([p[k], 1 - p[k]], [q[k], 1 - q[k]])
        rest = textbook_kl([p[i] / (1 - p[k]) for i in others], [q[i] / (1 - q[k]) for i in others])
        return target_part, rest, p[k]

    rows = [parts(s.tolist(), t.tolist(), k) for s, t, k in zip(*pair, target.tolist(), strict=True)]
    expected = torch.tensor([temperature**2 * (first + 8 * rest) for first, rest, _ in rows])
    torch.testing.assert_close(dkd(*pair, target, temperature, 8.0), expected)
    together = torch.tensor([temperature**2 * (first + (1 - p) * rest) for first, rest, p in rows])
    torch.testing.assert_close(kd(*pair, temperature), together)


LOSSES = {
    "kd": kd,
    "dkd": lambda student, teacher: dkd(student, teacher, torch.zeros(len(student), dtype=torch.long)),
    "skew-kl": skew_kl,
    "skew-reverse-kl": skew_reverse_kl,
    "mse": mse,
    "cosine": cosine,
}


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_lost_when_both_agree_and_something_when_not(name):
    logits = torch.randn(4, 6)
    torch.testing.assert_close(LOSSES[name](logits, logits), torch.zeros(4), atol=1e-6, rtol=0)
    assert (LOSSES[name](torch.randn(4, 6), logits) > 1e-3).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    """float32 arithmetic: differences over 1e-2."""
    student, teacher = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    LOSSES[name](student, teacher).sum().backward()
    for place in ((0, 0), (0, 3), (1, 2)):
        moved = torch.zeros(2, 5)
        moved[place] = 1e-2
        with torch.no_grad():
            up, down = (LOSSES[name](student + sign * moved, teacher).sum() for sign in (1, -1))
        assert student.grad[place].item() == pytest.approx((up - down).item() / 2e-2, abs=2e-3)


def test_skewed_losses_stay_finite_where_kl_explodes():
    """A class that the teacher is sure of and the student has ruled out."""
    student = torch.tensor([[-2000.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[2000.0, 0.0]])
    assert kd(student, teacher).item() == 2000
    assert skew_kl(student, teacher, skew=0.1).item() == pytest.approx(-math.log(0.1))
    skew_kl(student, teacher).sum().backward()
    assert torch.isfinite(student.grad).all()


def test_temperature_squared_keeps_the_gradient_of_high_temperatures():
    """Hinton et al., section 2.1: at high temperature the gradient tends to (z - v) / N for logits of zero mean."""
    student, teacher = torch.randn(3, 8), torch.randn(3, 8)
    student, teacher = (logits - logits.mean(-1, keepdim=True) for logits in (student, teacher))
    for temperature in (100.0, 1000.0):
        leaf = student.clone().requires_grad_()
        kd(leaf, teacher, temperature).sum().backward()
        torch.testing.assert_close(leaf.grad, (student - teacher) / 8, atol=0.02, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_top_and_tail_costs_no_more_than_all_and_ever_more_of_it(temperature):
    student, teacher = 2 * torch.randn(20, 50), 2 * torch.randn(20, 50)
    everything, before = kd(student, teacher, temperature), torch.zeros(20)
    for num in (1, 4, 16, 49):
        classes = teacher.topk(num).indices
        loss = kd(*(top_and_tail(logits, classes, temperature) for logits in (student, teacher)), temperature)
        assert (loss >= before - 1e-5).all()
        assert (loss <= everything + 1e-5).all()
        before = loss
    torch.testing.assert_close(before, everything)  # all but one, and that one


def test_top_and_tail_is_exact_where_the_tails_are_alike():
    teacher = torch.randn(5, 30)
    classes = teacher.topk(6).indices
    student = teacher.clone()
    student.scatter_(1, classes, torch.randn(5, 6))
    parts = (top_and_tail(logits, classes, 2.0) for logits in (student, teacher))
    torch.testing.assert_close(kd(*parts, 2.0), kd(student, teacher, 2.0))

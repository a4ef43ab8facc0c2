"""Distances between a student's and its teacher's outputs: one number a prediction, to be averaged.

kd               KL(p || q) at a temperature; Hinton et al. 2015, https://arxiv.org/abs/1503.02531
dkd              the target class and the others apart; Zhao et al. 2022, https://arxiv.org/abs/2203.08679
skew-kl          KL(p || mix of p and q); Ko et al. 2024 (DistiLLM), https://arxiv.org/abs/2402.03898
skew-reverse-kl  KL(q || mix of q and p); the same
mse, cosine      squared distance, and 1 - cosine, of logits or embeddings

p is what the teacher says, q what the student does. All that compare probabilities are multiplied by the squared
temperature, so that gradients keep their size when it changes.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax

Outputs = Float[Tensor, "prediction class_"]
Losses = Float[Tensor, " prediction"]


def kl(log_p: Outputs, log_q: Outputs) -> Losses:
    """KL(p || q) in nats; a class that p never gives costs nothing."""
    return (log_p.exp() * (log_p - log_q).masked_fill(log_p.isneginf(), 0)).sum(-1)


def kd(student: Outputs, teacher: Outputs, temperature: float = 1.0) -> Losses:
    """The classic distillation loss: `T^2 KL(p || q)`, both softened by T.

    >>> logits = torch.tensor([[0.0, 1.0]])
    >>> kd(logits, logits).item()
    0.0
    """
    log_q, log_p = (log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    return temperature**2 * kl(log_p, log_q)


def dkd(
    student: Outputs,
    teacher: Outputs,
    target: Int[Tensor, " prediction"],
    temperature: float = 1.0,
    non_target: float = 8.0,
) -> Losses:
    """T^2 (KL of target against all others + `non_target` KL among the others).

    `kd` is the same sum with the teacher's own probability of not being the target as the factor of the second part:
    the surer the teacher, the less of what it knows about the other classes gets through.
    """
    is_target = torch.zeros_like(student, dtype=torch.bool).scatter(-1, target.unsqueeze(-1), True)
    pairs, others = [], []
    for logits in (student, teacher):
        scaled = logits.float() / temperature
        rest = scaled.masked_fill(is_target, -torch.inf)
        logit = scaled.gather(-1, target.unsqueeze(-1))
        pairs.append(log_softmax(torch.cat([logit, rest.logsumexp(-1, keepdim=True)], -1), -1))
        others.append(log_softmax(scaled[~is_target].view(len(scaled), -1), -1))
    return temperature**2 * (kl(pairs[1], pairs[0]) + non_target * kl(others[1], others[0]))


def skew_kl(student: Outputs, teacher: Outputs, temperature: float = 1.0, skew: float = 0.1) -> Losses:
    """T^2 KL(p || skew p + (1 - skew) q): finite gradients where the student gives next to nothing."""
    log_q, log_p = (log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    return temperature**2 * kl(log_p, mixed(log_p, log_q, skew))


def skew_reverse_kl(student: Outputs, teacher: Outputs, temperature: float = 1.0, skew: float = 0.1) -> Losses:
    """T^2 KL(q || skew q + (1 - skew) p): the student may leave out what it cannot reach."""
    log_q, log_p = (log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    return temperature**2 * kl(log_q, mixed(log_q, log_p, skew))


def mixed(log_a: Outputs, log_b: Outputs, share: float) -> Outputs:
    """The logarithm of a mixture, `log(share * a + (1 - share) * b)`, of two log-probabilities."""
    shares = torch.tensor([share, 1 - share], dtype=log_a.dtype, device=log_a.device).log()
    return torch.logaddexp(log_a + shares[0], log_b + shares[1])


def mse(student: Outputs, teacher: Outputs) -> Losses:
    """Squared distance, summed over the classes or dimensions."""
    return (student.float() - teacher.float()).square().sum(-1)


def cosine(student: Outputs, teacher: Outputs) -> Losses:
    """The loss 1 - cosine."""
    return 1 - cosine_similarity(student.float(), teacher.float(), dim=-1)


def top_and_tail(
    logits: Float[Tensor, "prediction vocab"], classes: Int[Tensor, "prediction top"], temperature: float = 1.0
) -> Float[Tensor, "prediction top_and_one"]:
    """The logits of some classes, and one that stands for all the rest: its probability, at this temperature, is theirs
    together. Comparing these instead of all logits never costs more KL than there is, and all of it where the student's
    rest is shaped like the teacher's.

    >>> top_and_tail(torch.zeros(1, 4), torch.tensor([[2, 0]])).softmax(-1).tolist()
    [[0.25, 0.25, 0.5]]
    """
    logits = logits.float()
    rest = (logits / temperature).scatter(-1, classes, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, classes), temperature * rest], -1)

"""The divergence between two models' predictions, against its formula."""

import pytest
import torch
from torch.nn import functional as F

from krony.models import divergence as module
from krony.models.divergence import NO_LABEL, Goal, Head, divergence, following, head_divergence


def pair(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*size, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_that_of_the_formula(temperature):
    student, teacher = pair(2, 3, 5)
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    expected = (p * (p / q).log()).sum(-1).mean() * temperature**2
    torch.testing.assert_close(divergence(student, teacher, Goal(temperature)), expected)
    torch.testing.assert_close(
        divergence(student.bfloat16(), teacher.bfloat16(), Goal(temperature)).double(), expected, rtol=0.05, atol=0
    )
    assert divergence(teacher, teacher) == 0


@pytest.mark.parametrize("piece", [1, 11, 2**22])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_its_gradient_in_pieces_of_any_size(monkeypatch, piece, temperature):
    monkeypatch.setitem(module.PIECES, "cpu", piece)
    student, teacher = pair(2, 3, 5)
    student.requires_grad_()
    p, log_q = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    expected = 3 * F.kl_div(log_q.flatten(0, 1), p.flatten(0, 1), reduction="batchmean") * temperature**2
    ours = 3 * divergence(student, teacher, Goal(temperature))
    torch.testing.assert_close(ours, expected)
    (wanted,) = torch.autograd.grad(expected, student)
    for _ in range(2):  # a graph that is kept can be gone through again
        torch.testing.assert_close(torch.autograd.grad(ours, student, retain_graph=True)[0], wanted)
    half = student.detach().bfloat16().requires_grad_()
    divergence(half, teacher.bfloat16(), Goal(temperature)).backward()
    torch.testing.assert_close(3 * half.grad.double(), wanted, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("rows", [2, 128])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "goal", [Goal(), Goal(2.5), Goal(1.0, 0.3, torch.tensor([1, 4, NO_LABEL, 0, 2, NO_LABEL])),
             Goal(2.5, 0.3, torch.tensor([1, 4, NO_LABEL, 0, 2, NO_LABEL])), Goal(1.0, 1.0, torch.arange(6) % 5)],
    ids=["plain", "temperature", "text", "both", "text alone"],
)  # fmt: skip
def test_a_head_and_a_text_share_against_the_formula(monkeypatch, rows, bias, goal):
    """The loss and every gradient, with all the logits in one piece and by torch's own functions."""
    monkeypatch.setattr(module, "HEAD_ROWS", rows)
    monkeypatch.setitem(module.PIECES, "cpu", 7)
    states, wanted = pair(2, 3, 4)
    head, wanted_head = (Head(torch.randn(5, 4).double(), torch.randn(5).double() if bias else None) for _ in range(2))
    leaves = [x.requires_grad_() for x in (states, *head) if x is not None]
    logits, theirs = (h.logits(x).flatten(0, 1) for h, x in ((head, states), (wanted_head, wanted)))
    t = goal.temperature
    p, log_q = (theirs / t).softmax(-1), (logits / t).log_softmax(-1)
    expected = (1 - goal.text) * F.kl_div(log_q, p, reduction="batchmean") * t**2
    if goal.labels is not None:
        expected = expected + goal.text * F.cross_entropy(logits, goal.labels, ignore_index=NO_LABEL)
    for ours in (head_divergence(states, wanted, head, wanted_head, goal), divergence(logits, theirs, goal)):
        torch.testing.assert_close(ours, expected)
        for mine, right in zip(
            torch.autograd.grad(3 * ours, leaves, retain_graph=True),
            torch.autograd.grad(3 * expected, leaves, retain_graph=True), strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(mine, right)


def test_the_logits_of_a_long_text_are_never_in_memory_at_once(monkeypatch):
    sizes = []
    plain = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, x: sizes.append(len(x)) or plain(self, x))
    head = Head(torch.randn(11, 4))
    head_divergence(torch.randn(1000, 4), torch.randn(1000, 4), head, head)
    assert sum(sizes) == 2000 and max(sizes) == module.HEAD_ROWS


def test_the_last_token_of_a_row_is_followed_by_none():
    assert following(torch.tensor([[1, 2], [3, 4]])).tolist() == [2, NO_LABEL, 4, NO_LABEL]

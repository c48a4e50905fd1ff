"""The divergence between two models' predictions, against its formula."""

import pytest
import torch
from torch.nn import functional as F

from krony.models.divergence import divergence


def pair(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*size, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_that_of_the_formula(temperature):
    student, teacher = pair(2, 3, 5)
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    expected = (p * (p / q).log()).sum(-1).mean() * temperature**2
    torch.testing.assert_close(divergence(student, teacher, temperature), expected)
    torch.testing.assert_close(
        divergence(student.bfloat16(), teacher.bfloat16(), temperature).double(), expected, rtol=0.05, atol=0
    )
    assert divergence(teacher, teacher) == 0


@pytest.mark.parametrize("piece", [1, 11, 2**22])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_its_gradient_in_pieces_of_any_size(monkeypatch, piece, temperature):
    monkeypatch.setattr("krony.models.divergence.PIECE", piece)
    student, teacher = pair(2, 3, 5)
    student.requires_grad_()
    p, log_q = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    expected = 3 * F.kl_div(log_q.flatten(0, 1), p.flatten(0, 1), reduction="batchmean") * temperature**2
    ours = 3 * divergence(student, teacher, temperature)
    torch.testing.assert_close(ours, expected)
    (wanted,) = torch.autograd.grad(expected, student)
    for _ in range(2):  # a graph that is kept can be gone through again
        torch.testing.assert_close(torch.autograd.grad(ours, student, retain_graph=True)[0], wanted)
    half = student.detach().bfloat16().requires_grad_()
    divergence(half, teacher.bfloat16(), temperature).backward()
    torch.testing.assert_close(3 * half.grad.double(), wanted, rtol=0.05, atol=1e-3)

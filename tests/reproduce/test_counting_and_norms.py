"""Tables 1 to 4: exact counts, and norms against plain torch."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import krony
from krony.kronecker.schemes import resolve
from krony.models.source import empty_model
from krony.reproduce.analogous_scheme import analogous_scheme
from krony.reproduce.figures import TABLE4
from krony.reproduce.norms import gaussian_control, table4
from krony.reproduce.options import TableOptions
from krony.reproduce.recognition import has_gpt2s_config, likeness
from krony.reproduce.targets import TARGETS, reproduce


@pytest.mark.parametrize("model", ["gpt2", "demo"])
def test_table_1_is_exact_anywhere(model):
    lines = reproduce("table1", TableOptions(model=model)).lines
    assert len(lines) == 44 and all(line.difference == 0 for line in lines)


def test_tables_2_and_3_are_the_papers_as_rounded_but_for_what_is_noted():
    for line in reproduce("table2", TableOptions()).lines:
        truncated = math.floor(line.ours * 10) / 10 if line.row == "256x64" else math.floor(line.ours)
        assert truncated == line.paper
    two, four = reproduce("table3", TableOptions()).lines
    assert math.floor(two.ours) == two.paper and "80,400,096 with the scalars" in two.note
    assert four.ours == pytest.approx(92.983488) and four.difference == pytest.approx(0.783488)


def van_loan(weight, m1, n1, k):
    """The paper's Appendix A, with a full SVD in the place of the random one."""
    m2, n2 = weight.shape[0] // m1, weight.shape[1] // n1
    r = weight.reshape(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
    u, s, v = torch.linalg.svd(r, full_matrices=False)
    near = (u[:, :k] * s[:k]) @ v[:k]
    return near.reshape(m1, n1, m2, n2).permute(0, 2, 1, 3).reshape(weight.shape)


def test_table_4_of_a_model_of_gpt2s_shape_is_what_plain_torch_gives(tmp_path, monkeypatch):
    """GPT-2 124M's own shapes at random: norms of the whole matrix, 96M and 92M, and the Gaussian control."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=3, vocab_size=64, n_positions=8))
    monkeypatch.setattr("krony.reproduce.norms.load_base", lambda options, target: model)
    outcome = table4(TableOptions(model="random"))
    found = {(line.row, line.quantity): line.ours for line in outcome.lines}
    for name, layer, part in [("Lay 1, p1 (here 0)", 0, "c_fc"), ("Lay 11, p2 (here 1)", 1, "c_proj")]:
        weight = getattr(model.transformer.h[layer].mlp, part).weight.detach()  # (in, out)
        tall = (weight if part == "c_proj" else weight.T).double()
        assert tall.shape == (3072, 768)
        for who, near in [
            ("original", tall),
            ("96M", van_loan(tall, 1536, 768, 1)),
            ("92M", van_loan(tall, 1024, 256, 4)),
        ]:
            assert found[name, f"{who}, Frobenius"] == pytest.approx(near.norm().item(), rel=1e-6)
            assert found[name, f"{who}, l1, thousands"] == pytest.approx(near.abs().sum().item() / 1e3, rel=1e-6)
            if who != "original":
                share = 100 * (near.norm() / tall.norm()).item()
                assert found[name, f"{who} keeps, %"] == pytest.approx(share, rel=1e-6)
    assert found["Gaussian 3072x768", "96M keeps, %"] == pytest.approx(70.75, abs=0.05)
    assert found["Gaussian 3072x768", "92M keeps, %"] == pytest.approx(66.9, abs=0.1)
    assert found["all layers", "92M keeps at least, %"] == pytest.approx(
        66.9, abs=0.1
    )  # random weights are the control


def test_the_control_is_about_the_root_of_the_share_of_parameters():
    """With k of n columns of a Gaussian matrix: sqrt(k/n), and a little more because the best are kept."""
    for scheme, share in (("512x256", 1 / 2), ("256x256", 1 / 4), ("256x128:4", 4 / 8)):
        (kept,) = gaussian_control(1024, 256, [scheme])
        assert 100 * share**0.5 < kept < 100 * share**0.5 + 1


@pytest.fixture
def as_gpt2(monkeypatch):
    """A narrow model of 12 layers that passes for GPT-2's config, with the norms that Table 4 prints."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=12, n_embd=48, n_head=4, vocab_size=64, n_positions=8))
    with torch.no_grad():
        for paper in TABLE4:
            mlp = model.transformer.h[paper.layer - 1].mlp
            weight = (mlp.c_fc if paper.matrix == 1 else mlp.c_proj).weight
            weight.mul_(paper.frobenius[0] / weight.norm())
    monkeypatch.setattr("krony.reproduce.norms.load_base", lambda options, target: model)
    monkeypatch.setattr("krony.reproduce.recognition.has_gpt2s_config", lambda model: True)
    return model


def test_the_papers_layers_are_found_by_their_norms(as_gpt2):
    """GPT-2 as the paper saw it, its layers counted from 1: the table says so."""
    outcome = table4(TableOptions(model="gpt2"))
    assert "taken to count from 1" in " ".join(outcome.header)
    assert outcome.lines[0].row == "Lay 1, p1 (here 0)"
    assert outcome.lines[0].difference == pytest.approx(0, abs=1e-3)


def test_gpt2_is_known_by_its_norms_whatever_it_is_called(as_gpt2):
    named, folder = (table4(TableOptions(model=name)) for name in ("gpt2", "/models/a-copy"))
    assert folder.lines == named.lines and folder.lines[0].difference is not None
    assert folder.header[0].startswith(
        "/models/a-copy is GPT-2 124M by its config and the norms of Table 4, within 0.0"
    )
    with torch.no_grad():
        as_gpt2.transformer.h[10].mlp.c_proj.weight.mul_(1.02)
    other = table4(TableOptions(model="gpt2"))
    assert (
        "gpt2 is not GPT-2 124M, because transformer.h.10.mlp.c_proj has norm 310.1 and Table 4 prints 304, "
        in (other.header[1])
    )
    assert other.lines[0].difference is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(), True),
        (GPT2Config(n_layer=11), False),
        (GPT2Config(vocab_size=50_258), False),
        (GPT2Config(n_inner=3000), False),
    ],
)
def test_gpt2s_config(config, expected):
    assert has_gpt2s_config(empty_model(config)) == expected


def test_a_random_model_called_gpt2_is_another(gpt2_folder):
    """The folder's name is gpt2."""
    like = likeness(krony.load_model(str(gpt2_folder)))
    assert gpt2_folder.name == "gpt2" and not like.is_gpt2 and like.reason == "its config is another"


def test_a_dry_run_of_table_4_reads_no_weights(gpt2_folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("weights are read")

    monkeypatch.setattr("krony.reproduce.norms.load_base", refuse)
    outcome = reproduce("table4", TableOptions(model=str(gpt2_folder), dry_run=True))
    assert outcome.lines == [] and "in place of GPT-2, because its config is another" in outcome.header[0]
    assert "Norms of 6 matrices of 192x48 and of a Gaussian one" in outcome.header[1]
    assert "96x48 and 64x16:4" in outcome.header[1] and "About 1 second on this machine" in outcome.header[1]
    (sentence, _) = reproduce("table4", TableOptions(dry_run=True)).header  # needs no weights: its config is known
    assert sentence == "gpt2: its config is GPT-2's, and its norms are compared with Table 4's when it runs."


@pytest.mark.parametrize(
    ("scheme", "rows", "columns", "expected"),
    [
        ("1536x768", 1024, 256, "512x256"),
        ("3072x384", 1024, 256, "1024x128"),
        ("768x768", 1024, 256, "256x256"),
        ("1024x256:4", 1024, 256, "256x128:4"),  # 3 divides neither side
        ("1024x256:2", 1536, 576, "512x192:2"),
        ("768x768", 3072, 768, "768x768"),
        ("768x384:4", 1024, 256, "256x128:4"),
    ],
)
def test_analogous_schemes(scheme, rows, columns, expected):
    assert analogous_scheme(scheme, rows, columns) == expected
    assert resolve(expected, rows, columns).factors == resolve(scheme, 3072, 768).factors


def test_mistakes():
    with pytest.raises(krony.KronyError, match="'table10' is unknown: it is one of table1, table2"):
        reproduce("table10", TableOptions())
    with pytest.raises(krony.KronyError, match="budget 'big' is unknown: it is quick or full"):
        TableOptions(budget="big")
    with pytest.raises(krony.KronyError, match="no scheme of a 3x2 matrix corresponds to GPT-2's 1024x256:4"):
        analogous_scheme("1024x256:4", 3, 2)
    assert list(TARGETS) == [f"table{n}" for n in range(1, 10)] + ["figure1"]


def test_without_gpt2_it_says_what_is_needed():
    for target in ("table4", "table5", "figure1"):
        with pytest.raises(krony.KronyError, match=rf"{target} needs GPT-2's weights, .* such as demo: gpt2: "):
            reproduce(target, TableOptions())

"""Training all layers together: nearer to the original, and nothing moves that should stay."""

import copy

import pytest
import torch
from torch.nn import functional as F

from krony import KronyConfig, KronyError, compress
from krony.compression import compress as compression
from krony.compression import tuning
from krony.models.export import slim
from krony.models.surgery import kronecker_layers, take_out
from small_models import gpt2, llama

BUILD = {"gpt2": gpt2, "llama": llama}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (24, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr("krony.models.precision.fast_dtype", lambda _: torch.float32)


def sharp(build):
    """A random model whose MLPs and head are large enough to matter."""
    model = build(tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name or "lm_head" in name:
                parameter.mul_(30 if "mlp" in name else 10)
    return model


@torch.no_grad()
def divergence(model, original, ids):
    """Mean KL(original ‖ model) a token, in float64 and by its definition."""
    q, p = (m(ids).logits.double().log_softmax(-1) for m in (model, original))
    return F.kl_div(q, p, log_target=True, reduction="sum").item() / ids.numel()


CONFIGS = (
    {"scheme": "keep=0.5"},
    {"scheme": "keep=0.34", "allocation": "global", "reconstruct": 5},
    {"scheme": "24x48:3", "init": "van-loan", "scalars": True, "scalar_init": 2.0},
    {"scheme": "keep=0.5", "init": "van-loan"},
)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("family", list(BUILD))
def test_it_comes_nearer_to_the_original(family, config, ids):
    original = sharp(BUILD[family])
    plain, model = copy.deepcopy(original), copy.deepcopy(original)
    compress(plain, KronyConfig(**config), calibration=ids)
    report = compress(model, KronyConfig(**config, tune=60, tune_text=0.0), calibration=ids)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    held, trained = ids[order[:3]], ids[order[3:]]  # an eighth is held out
    assert report.tuned.before == pytest.approx(divergence(plain, original, held), rel=1e-3)
    assert report.tuned.after == pytest.approx(divergence(model, original, held), rel=1e-3)
    assert report.tuned.after < report.tuned.before
    assert divergence(model, original, trained) < 0.98 * divergence(plain, original, trained)
    assert report.to_json()["tuned"] == {**vars(report.tuned)} and report.tuned.steps == 60

    factors = {f"{name}.{part}" for name in kronecker_layers(model) for part in ("weight", "scalars", "bias")}
    before, after = dict(plain.named_parameters()), dict(model.named_parameters())
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved and moved <= factors
    assert all(p.requires_grad and p.grad is None for p in after.values())


@pytest.mark.parametrize("family", list(BUILD))
def test_everything_but_the_embeddings_and_right_factors_can_train(family, ids):
    original = sharp(BUILD[family])
    plain, model = copy.deepcopy(original), copy.deepcopy(original)
    start = {"scheme": "keep=0.5", "init": "van-loan"}
    compress(plain, KronyConfig(**start), calibration=ids)
    compress(model, KronyConfig(**start, tune=30, tune_all=True, tune_text=0.0), calibration=ids)
    before, after = dict(plain.named_parameters()), dict(model.named_parameters())
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    stay = {name for name in after if name.endswith(".right")}
    stay |= {name for name in after if after[name] is model.get_input_embeddings().weight}
    assert moved == set(after) - stay
    assert divergence(model, original, ids) < divergence(plain, original, ids)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_the_divergence_and_a_share_of_the_text(share, ids):
    model, original = sharp(gpt2), sharp(gpt2)
    compress(model, KronyConfig("keep=0.5"), calibration=ids)
    row = ids[3:4]
    text = F.cross_entropy(model(row).logits[0, :-1], row[0, 1:]).item()
    expected = (1 - share) * divergence(model, original, row) + share * text
    found = tuning._Lesson(model, original, ids, share).loss(3).item()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)  # float32 differences of logarithms near 5


@torch.no_grad()
def test_it_is_judged_by_the_loss_that_it_trains(monkeypatch):
    """Text pulls away from the original's predictions, so that a training may succeed though the divergence rises."""
    text = torch.tensor([7, 9]).repeat(24, 16)  # nothing like what a random model predicts
    monkeypatch.setattr(tuning, "RATE", 0.02)  # a random model learns slowly
    original = gpt2(tie_word_embeddings=False)
    plain, model = copy.deepcopy(original), copy.deepcopy(original)
    compress(plain, KronyConfig("keep=0.9"), calibration=text)
    report = compress(model, KronyConfig("keep=0.9", tune=40, tune_all=True, tune_text=0.5), calibration=text)
    tuned = report.tuned
    held = text[torch.randperm(24, generator=torch.Generator().manual_seed(0))[:3]]

    def loss(of):
        likelihood = F.cross_entropy(of(held).logits[:, :-1].flatten(0, 1), held[:, 1:].flatten()).item()
        return 0.5 * divergence(of, original, held) + 0.5 * likelihood

    assert (tuned.loss_before, tuned.loss_after) == pytest.approx((loss(plain), loss(model)), rel=1e-3)
    assert tuned.improved and tuned.loss_after < tuned.loss_before - 0.05
    assert tuned.after == pytest.approx(divergence(model, original, held), rel=1e-2) and tuned.after > tuned.before
    words = f"the loss {tuned.loss_before:.3f} -> {tuned.loss_after:.3f}, the divergence from the original"
    assert words in str(report) and words in report._repr_html_()


def test_an_interruption_leaves_every_weight(ids):
    model = sharp(gpt2)
    before = copy.deepcopy(model.state_dict())

    def interrupt(done, total, what):
        if "all layers" in what and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, KronyConfig("keep=0.5", tune=9, tune_all=True), calibration=ids, progress=interrupt)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)


def test_an_embedding_is_factorised_before_the_others_train(ids, monkeypatch):
    """So that they make up for it, and the divergence that is reported is that of the model that comes out."""
    model, seen = gpt2(), []
    original = copy.deepcopy(model)

    def watched(student, teacher, *args, **options):
        found = tuning.tune(student, teacher, *args, **options)
        seen.append(divergence(student, original, ids))
        return found

    monkeypatch.setattr(compression, "tune", watched)
    compress(model, KronyConfig("keep=0.5", tune=4, embedding=2), calibration=ids)
    assert seen == [pytest.approx(divergence(model, original, ids), rel=1e-6)]
    assert not model.config.tie_word_embeddings


def test_a_head_that_was_tied_to_a_factorised_embedding_does_not_train(ids):
    model = gpt2()
    head = model.lm_head.weight.detach().clone()
    compress(model, KronyConfig("keep=0.5", tune=4, tune_all=True, embedding=2), calibration=ids)
    assert torch.equal(model.lm_head.weight, head)


def test_an_interruption_leaves_the_embedding_and_the_head_tied_to_it(ids):
    model = gpt2()
    before = copy.deepcopy(model.state_dict())

    def interrupt(done, total, what):
        if "all layers" in what and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, KronyConfig("keep=0.5", tune=9, embedding=2), calibration=ids, progress=interrupt)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.config.tie_word_embeddings


def test_the_errors_in_the_report_are_those_of_the_layers_that_come_out(ids):
    original, model = sharp(gpt2), sharp(gpt2)
    report = compress(model, KronyConfig("keep=0.5", init="van-loan", tune=20), calibration=ids)
    for layer in report.layers:
        weight = take_out(original, layer.name)[0].double()
        lost = (model.get_submodule(layer.name).dense_weight(torch.float64) - weight).norm() / weight.norm()
        assert layer.error == pytest.approx(lost.item(), rel=1e-6)


def test_dropped_neurons_stay_dropped(ids):
    model = sharp(llama)
    compress(model, KronyConfig("keep=0.5", tune=10), calibration=ids)
    expected = model(ids).logits
    torch.testing.assert_close(slim(model).model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_training_that_makes_it_worse_is_undone(ids, monkeypatch):
    plain, model = sharp(gpt2), sharp(gpt2)
    compress(plain, KronyConfig("keep=0.5"), calibration=ids)
    monkeypatch.setattr(tuning, "RATE", 100.0)
    report = compress(model, KronyConfig("keep=0.5", tune=3), calibration=ids)
    assert report.tuned.after == report.tuned.before and not report.tuned.improved
    assert "3 steps of training did not lower the loss on sequences held back" in str(report)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_twice_and_dtype_and_mode_are_kept(dtype, ids):
    models = [sharp(gpt2).to(dtype).train(), sharp(gpt2).to(dtype).train()]
    for model in models:
        report = compress(model, KronyConfig("keep=0.5", init="van-loan", tune=8), calibration=ids)
        assert report.tuned.after < report.tuned.before
    first, second = (dict(m.named_parameters()) for m in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {p.dtype for p in first.values()} == {dtype} and models[0].training


def test_half_precision_with_biases_and_mixed_outputs(ids):
    """Autocast leaves sums alone: a float32 bias must not turn the residual stream to float32."""
    model = gpt2().bfloat16()
    report = compress(model, KronyConfig("48x24:2", init="van-loan", tune=2), calibration=ids)
    assert report.tuned is not None and model(ids).logits.dtype == torch.bfloat16


def test_a_lone_sequence_is_enough(ids):
    report = compress(sharp(llama), KronyConfig("keep=0.5", init="van-loan", tune=5), calibration=ids[:1])
    assert report.tuned.after < report.tuned.before


@pytest.mark.parametrize("late", [False, True])
def test_stopped_it_leaves_the_model_as_it_was(ids, monkeypatch, late):
    """While it tunes, and after that, while the errors are measured."""
    model, before = sharp(llama), sharp(llama).state_dict()

    def stop(done, total, what):
        if "together" in what and not late:
            raise KeyboardInterrupt

    def stop_late(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compression, "_measure_again", stop_late)
    with pytest.raises(KeyboardInterrupt):
        compress(model, KronyConfig("keep=0.5", tune=5), calibration=ids, progress=stop)
    assert not kronecker_layers(model) and all(p.requires_grad for p in model.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(model(ids).logits, sharp(llama)(ids).logits, rtol=0, atol=0)


def test_what_it_refuses():
    with pytest.raises(KronyError, match="tune needs calibration text"):
        compress(gpt2(), KronyConfig("keep=0.5", init="van-loan", tune=5))
    with pytest.raises(KronyError, match="tune is -1: it takes a number of steps"):
        KronyConfig("keep=0.5", tune=-1)
    with pytest.raises(KronyError, match="tune trains towards the original"):
        KronyConfig("keep=0.5", tune=1, reinit="all")

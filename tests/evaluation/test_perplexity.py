"""Both protocols against a few lines of plain transformers, and last-word accuracy against one passage at a time.

Several processes get the result of one.
"""

import copy
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import GPT2Config

from krony import KronyError, evaluate
from krony.data.sets import join_documents, join_rows
from krony.evaluation.perplexity import last_word_accuracy, windows
from processes import krony, together
from small_models import gpt2, llama

TEXT = "All happy families are alike; each unhappy family is unhappy in its own way.\n" * 4


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def published_script(model, ids, max_length, stride):
    """The loop of the paper's perplexity_eval.py (it is the one of transformers' documentation)."""
    nlls, counts, previous = [], [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        target_length = end - previous
        piece = ids[None, begin:end]
        labels = piece.clone()
        labels[:, :-target_length] = -100
        with torch.no_grad():
            nlls.append(model(piece, labels=labels).loss.double())
        counts.append(int((labels[:, 1:] != -100).sum()))
        previous = end
        if end == len(ids):
            break
    return torch.stack(nlls), torch.tensor(counts)


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (50, 50), (64, 32), (64, 7)])
def test_paper_protocol_is_the_published_script(model, tokenizer, text_file, window, stride):
    ids = join_rows([TEXT], tokenizer)
    assert len(ids) % window  # so there is a short last window, and it counts as one
    nlls, counts = published_script(model, ids, window, stride)
    result = evaluate(model, tokenizer, text_file, protocol="paper", window=window, stride=stride)
    assert result.perplexity == pytest.approx(nlls.mean().exp().item(), rel=1e-5)
    assert result.tokens == counts.sum()


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (64, 16)])
def test_token_protocol_weights_every_token_equally(model, tokenizer, text_file, window, stride):
    ids = join_documents([TEXT], tokenizer)
    nlls, counts = published_script(model, ids, window, stride)
    result = evaluate(model, tokenizer, text_file, protocol="token", window=window, stride=stride)
    assert result.perplexity == pytest.approx(((nlls * counts).sum() / counts.sum()).exp().item(), rel=1e-5)
    assert result.accuracy is None


def test_a_stride_of_one_is_the_likelihood_of_each_token_given_all_before(tokenizer, text_file):
    model, ids = gpt2(), join_documents([TEXT], tokenizer)[:40]
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
    nll = -logits.gather(1, ids[1:, None]).mean()
    result = evaluate(model, tokenizer, text_file, protocol="token", window=40, stride=1, max_tokens=40)
    assert result.perplexity == pytest.approx(nll.exp().item(), rel=1e-5)
    assert result.tokens == 39


@given(st.integers(2, 200), st.integers(1, 30), st.integers(1, 30))
def test_windows_cover_every_token_once(length, window, stride):
    stride = min(stride, window)
    covered = [i for _, end, fresh in windows(length, window, stride) for i in range(end - fresh, end)]
    assert covered == list(range(length))


def test_a_last_window_of_one_token_counts_for_nothing(tokenizer, tmp_path):
    model = gpt2()
    (tmp_path / "t.txt").write_text("x" * 33)
    (tmp_path / "s.txt").write_text("x" * 32)
    results = [evaluate(model, tokenizer, str(tmp_path / f), window=16) for f in ("t.txt", "s.txt")]
    assert results[0].perplexity == results[1].perplexity and math.isfinite(results[0].perplexity)


def test_the_window_is_the_context_by_default(tokenizer, text_file):
    assert evaluate(gpt2(), tokenizer, text_file).window == 64
    assert evaluate(llama(max_position_embeddings=4096), tokenizer, text_file).window == 1024


def test_documents_are_joined_by_the_end_of_text(tokenizer):
    ids = join_documents(["ab", "c"], tokenizer)
    assert len(ids) == 4 and ids[2] == tokenizer.eos_token_id


def test_lambada_has_an_accuracy(tokenizer, tmp_path):
    (tmp_path / "lambada").mkdir()
    passages = [f"he said {word} and then he said {word}" for word in ("yes", "no", "perhaps", "so")]
    (tmp_path / "lambada/lambada_test_plain_text.txt").write_text("\n".join(passages))
    result = evaluate(gpt2(), tokenizer, "lambada", data_dir=tmp_path)
    assert result.accuracy == 0.0  # of a random model


class NextLetter(torch.nn.Module):
    """A model that is sure of what follows: a space after a capital, "a" after a space, "b" after "a", and so on."""

    device = torch.device("cpu")
    config = GPT2Config(n_positions=64)

    def __init__(self, tokenizer):
        super().__init__()
        letters = tokenizer(" abcdefghijklmnopqrstuvwxyz")["input_ids"]
        self.after = torch.zeros(257, dtype=torch.long)
        self.after[letters[:-1]] = torch.tensor(letters[1:])
        self.after[tokenizer("ABCDEFGHIJKLMNOPQRSTUVWXYZ")["input_ids"]] = letters[0]

    def forward(self, ids, use_cache):
        return SimpleNamespace(logits=F.one_hot(self.after[ids], 257).float())


def test_the_last_word_counts_when_all_its_tokens_are_the_likeliest(tokenizer):
    passages = ["SO abc", "XYZ ab", "A LONGER ONE abcdef", "SO abd", "SO bc", "So abc"]
    assert last_word_accuracy(NextLetter(tokenizer), tokenizer, passages) == 3 / 6
    assert last_word_accuracy(NextLetter(tokenizer), tokenizer, passages[2:]) == 1 / 4
    assert last_word_accuracy(NextLetter(tokenizer), tokenizer, passages[1:], max_tokens=30) == 1.0  # the first two


def test_an_end_that_the_tokenizer_adds_is_not_part_of_the_text(tokenizer):
    """Nor of the last word: the model predicts what comes after the context, which has not ended."""
    ending = copy.deepcopy(tokenizer)
    mark = (ending.eos_token, ending.eos_token_id)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {mark[0]}", special_tokens=[mark])
    passages = ["SO abc", "XYZ ab", "SO abd"]
    assert ending("a")["input_ids"][-1] == mark[1]
    found = [last_word_accuracy(NextLetter(tokenizer), one, passages) for one in (tokenizer, ending)]
    assert found[0] == found[1] > 0
    assert torch.equal(join_rows(passages, ending), join_rows(passages, tokenizer))


def test_a_passage_longer_than_the_context_has_a_last_word_too(tokenizer):
    model = NextLetter(tokenizer)
    long = "A " * 40  # 80 tokens of 64
    assert last_word_accuracy(model, tokenizer, [f"{long}abc", f"{long}abd"]) == 1 / 2


def test_dropout_is_off_and_the_modes_are_restored(tokenizer, text_file):
    model = gpt2(resid_pdrop=0.5)
    expected = evaluate(model.eval(), tokenizer, text_file).perplexity
    model.train()
    model.transformer.h[1].eval()
    model.transformer.wte.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    assert evaluate(model, tokenizer, text_file).perplexity == expected and model.training
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not model.transformer.wte.weight.requires_grad and model.transformer.wpe.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protocol": "best"}, "protocol 'best' is unknown: it is paper or token"),
        ({"window": 65}, "a window of 65 tokens: this model takes from 2 to 64"),
        ({"window": 1}, "a window of 1 tokens"),
        ({"window": 0}, "a window of 0 tokens: at least 2"),
        ({"stride": 0}, "a stride of 0 tokens"),
        ({"stride": 65}, "a stride of 65 tokens: it takes a number from 1 to the window, 64"),
        ({"max_tokens": 1}, "max_tokens is 1"),
    ],
)
def test_options_that_make_no_sense(tokenizer, text_file, options, words):
    with pytest.raises(KronyError, match=words):
        evaluate(gpt2(), tokenizer, text_file, **options)


def test_a_tokenizer_of_another_model(tokenizer, text_file):
    with pytest.raises(KronyError, match="the tokenizer belongs to another model"):
        evaluate(gpt2(vocab_size=50), tokenizer, text_file)


def test_text_of_one_token(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(KronyError, match="has 1 tokens: there is nothing to predict"):
        evaluate(gpt2(), tokenizer, str(tmp_path / "t.txt"))


@pytest.fixture
def passages(tmp_path, text_file):
    """A text, and LAMBADA as a folder that holds it."""
    (tmp_path / "lambada").mkdir()
    words = ("yes", "no", "perhaps", "so", "never", "always", "soon")
    lines = [f"he said {word} and then {'again and ' * n}he said {word}" for n, word in enumerate(words)]
    (tmp_path / "lambada/lambada_test_plain_text.txt").write_text("\n".join(lines))
    return ["--data", text_file, "--data", "lambada", "--data-dir", str(tmp_path)]


def evaluated(folder, options, processes, out):
    """The figures of ``krony eval`` in this many processes, and what they printed."""
    arguments = ["eval", str(folder), *options, "--json", str(out)]
    if processes == 2:  # with the real launcher; the others are forked, for time
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_FSDP": "1"}  # which only healing can use
        command = [sys.executable, *launcher, "-m", "krony", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert (
            done.stderr.count("warning: ACCELERATE_USE_FSDP asks for shards, and krony heal alone works on them") == 1
        )
        return json.loads(out.read_text()), done.stdout
    printed = together(processes, out.with_suffix(".processes"), krony, *arguments)
    return json.loads(out.read_text()), "".join(printed)


@pytest.mark.parametrize(
    ("processes", "options"),
    [(2, ("--protocol", "paper")), (3, ("--protocol", "token")), (3, ("--protocol", "token", "--max-tokens", "60"))],
)
def test_several_processes_get_the_figures_of_one(processes, options, gpt2_folder, passages, tmp_path):
    """Exact for any number of processes: windows that overlap, a short last one, fewer windows than processes (two)."""
    options = [*passages, *options, "--window", "50", "--stride", "37", "--dtype", "float64"]
    expected, said = evaluated(gpt2_folder, options, 1, tmp_path / "one.json")
    found, printed = evaluated(gpt2_folder, options, processes, tmp_path / "several.json")
    assert found == expected and printed == said
    assert [result["data"] for result in found["results"]][1:] == ["lambada"]

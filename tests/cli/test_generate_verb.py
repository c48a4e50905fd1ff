"""``krony generate`` says where and why the text ends."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture
def ending(gpt2_folder, tmp_path):
    """A folder with a model that writes the end-of-text token, whatever comes before."""
    folder = tmp_path / "ending"
    shutil.copytree(gpt2_folder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.lm_head.weight[256])
        model.lm_head.weight[256] *= 10
    model.save_pretrained(folder)
    return folder


def test_the_context_is_full(krony, gpt2_folder):
    """The model takes 64 tokens: after a prompt of 60 it has room for 4."""
    done = krony("generate", gpt2_folder, "--prompt", "x" * 60, "--max-new-tokens", 5, "--json", "-")
    assert done.code == 0, done.err
    assert done.json["new_tokens"] == 4 and done.json["stopped"] == "context"
    assert "the text stops after 4 of 5 new tokens: the model's context of 64 is full" in done.err


def test_all_tokens_are_written(krony, gpt2_folder):
    for asked in (3, 4):
        done = krony("generate", gpt2_folder, "--prompt", "x" * 60, "--max-new-tokens", asked, "--json", "-")
        assert done.json["new_tokens"] == asked and done.json["stopped"] == "max_new_tokens"
        assert "context" not in done.err


def test_the_text_ends(krony, ending):
    """Also where its last token is the last that was asked for, or that has room."""
    for prompt, asked in (("x", 5), ("x", 1), ("x" * 63, 5)):
        done = krony("generate", ending, "--prompt", prompt, "--max-new-tokens", asked, "--json", "-")
        assert done.json["new_tokens"] == 1 and done.json["stopped"] == "end of text"
        assert "is full" not in done.err

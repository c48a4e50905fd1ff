"""The whole of it in Python, offline: build a small GPT-2, compress it, save it, load it, measure it, let it write.

The model is new, so its text is noise; with a pretrained one in its place nothing else changes.
"""

import tempfile

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import krony
from krony import python_docs

END = "<|endoftext|>"


def small_gpt2() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """A GPT-2 of 4 layers at random, and a tokenizer for Python's documentation."""
    inner = ByteLevelBPETokenizer()
    inner.train_from_iterator(python_docs.topics("calibration"), vocab_size=1024, special_tokens=[END])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer, eos_token=END, bos_token=END)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        n_layer=4, n_embd=128, n_head=4, n_positions=256, vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end
    )
    return GPT2LMHeadModel(config).eval(), tokenizer


def main() -> None:
    """Prints what each step gives."""
    model, tokenizer = small_gpt2()
    before = krony.evaluate(model, tokenizer, "python-docs", max_tokens=4096)
    report = krony.compress(model, krony.KronyConfig("keep=0.5", init="van-loan"))
    print(f"{report.params_before:,} -> {report.params_after:,} parameters, {len(report.layers)} matrices replaced")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    after = krony.evaluate(loaded, tokenizer, "python-docs", max_tokens=4096)
    print(f"perplexity on {after.tokens:,} tokens of Python's documentation: {before.perplexity:.1f} before, ", end="")
    print(f"{after.perplexity:.1f} after (an untrained model, so both are about its {len(tokenizer)} tokens)")
    inputs = tokenizer("The function returns", return_tensors="pt")
    output = loaded.generate(**inputs, max_new_tokens=8, do_sample=False)
    print(tokenizer.decode(output[0]))


if __name__ == "__main__":
    main()

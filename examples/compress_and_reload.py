"""Compress the model that comes with krony, save it, load it, and generate text: offline, in under a minute.

For another model, replace ``krony.demo_model()`` and the tokenizer, and calibrate on text similar to what the model
will see in use.
"""

import tempfile

from transformers import AutoModelForCausalLM

import krony

model, tokenizer = krony.demo_model(), krony.load_tokenizer("demo")
before = krony.evaluate(model, tokenizer, "python-docs")

text = krony.calibration_set("python-docs", tokenizer)
report = krony.compress(model, krony.KronyConfig(keep=0.5), calibration=text)
print(f"{report.params_before:,} -> {report.params_after:,} parameters, {len(report.layers)} matrices replaced")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)  # works because krony is imported
after = krony.evaluate(model, tokenizer, "python-docs")
print(f"perplexity on held-out documentation: {before.perplexity:.1f} -> {after.perplexity:.1f}")

inputs = tokenizer("The function returns", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
print(tokenizer.decode(output[0]))

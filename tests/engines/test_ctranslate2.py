"""CTranslate2's own converter reads slim models, and its engine continues as they do (docs/deployment.md)."""

import ctranslate2
import pytest
import torch
from ctranslate2.converters import TransformersConverter

import krony
from krony import KronyConfig
from krony.engines.plain import plain


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_engine_continues_as_the_model_does(name, of_type, words, tmp_path):
    model, text = of_type(name), torch.randint(0, 4096, (24, 64), generator=torch.Generator().manual_seed(1))
    krony.compress(model, KronyConfig("keep=0.5"), calibration=text)
    made, _ = plain(model)
    made.save_pretrained(tmp_path / "slim")
    words.save_pretrained(tmp_path / "slim")
    TransformersConverter(str(tmp_path / "slim")).convert(str(tmp_path / "converted"))
    ids = text[:1, :9]
    expected = model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)[0, 9:].tolist()
    engine = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", intra_threads=1)
    prompt = words.convert_ids_to_tokens(ids[0].tolist())
    options = {"max_length": 64, "min_length": 64, "include_prompt_in_result": False}
    assert engine.generate_batch([prompt], **options)[0].sequences_ids[0] == expected
    # and the probabilities of the prompt's own tokens
    scored = engine.score_batch([prompt])[0].log_probs
    with torch.no_grad():
        logits = made(ids).logits.log_softmax(-1)
    wanted = logits[0, :-1].gather(1, ids[0, 1:, None]).flatten()
    torch.testing.assert_close(torch.tensor(scored), wanted, rtol=1e-4, atol=1e-3)

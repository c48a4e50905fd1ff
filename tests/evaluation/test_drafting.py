"""Speculative decoding writes the original's own tokens, and its counts are those of the passes that were made."""

import copy

import pytest
import torch

import krony
from krony import KronyError
from krony.evaluation.drafting import Drafting, drafting_table, measure_drafts
from small_models import gpt2, llama

PROMPTS = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(3))


def measure(model, draft, **changes):
    options = {"lengths": [1, 3], "new_tokens": 12, "rounds": 1} | changes
    return measure_drafts(model, draft, PROMPTS, **options)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_its_own_draft_is_always_kept(make):
    """A draft that is the model: a pass of it keeps all that were drafted, and adds a token of its own."""
    model = make().eval()
    one, three = measure(model, copy.deepcopy(model), new_tokens=13)
    assert (one.drafted, three.drafted) == (1, 3)
    assert one.accepted == three.accepted == 1.0 and one.same == three.same == 1.0
    # after the prompt's pass each pass writes the drafted tokens and one more: 13 = 6 x 2 + 1, and 3 x 4 + 1
    assert one.per_pass == pytest.approx(13 / 7) and three.per_pass == pytest.approx(13 / 4)


def test_a_compressed_draft(tokenizer):
    """A draft that agrees at times: what is written is still what the model writes, and the counts say how often."""
    model = gpt2().eval()
    draft = copy.deepcopy(model)
    krony.compress(draft, krony.KronyConfig("keep=0.5", init="van-loan"))
    for found in measure(model, draft):
        assert found.same == 1.0 and 0 <= found.accepted <= 1
        # every pass but the drafts it keeps writes one token
        assert 1 <= found.per_pass <= 1 + found.drafted
    with torch.inference_mode():
        plain = model.generate(PROMPTS[:1], max_new_tokens=12, do_sample=False, pad_token_id=0)
        assisted = model.generate(
            PROMPTS[:1], max_new_tokens=12, do_sample=False, pad_token_id=0, assistant_model=draft
        )
    assert torch.equal(plain, assisted)


def test_the_draft_is_as_it_was():
    draft = gpt2().eval()
    before = draft.generation_config.to_dict()
    measure(gpt2().eval(), draft)
    assert draft.generation_config.to_dict() == before


def test_another_vocabulary():
    draft = gpt2().eval()
    draft.resize_token_embeddings(300)
    with pytest.raises(KronyError, match="the draft knows 300 tokens and the model 257: they need one vocabulary"):
        measure(gpt2().eval(), draft)


def test_a_draft_of_a_shorter_context():
    with pytest.raises(KronyError, match=r"the draft takes 16 tokens, and .* are written"):
        measure(gpt2().eval(), gpt2(n_positions=16).eval())


def test_the_table_and_the_verdict():
    found = Drafting(
        drafted=2,
        accepted=0.5,
        per_pass=2.0,
        tokens_per_s=30.0,
        plain_tokens_per_s=20.0,
        ratio=1.5,
        spread=0.1,
        same=1.0,
    )
    table = drafting_table([found])
    assert table.rows[0][:4] == ["none", "", "1.00", "20.0"]
    assert table.rows[1] == ["2", "50.0%", "2.00", "30.0", "1.50x", "100.0%"]
    assert found.sentence("small") == (
        "decoding with 2 tokens drafted by small is 1.50 times as fast as decoding without (spread 10.0%)"
    )
    assert drafting_table([]).rows == []

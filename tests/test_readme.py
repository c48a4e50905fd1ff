"""Every command and every line of Python in the README and the guides runs, and the README's figures are measured.

Commands and code run with a small model in GPT-2's place.
"""

import copy
import json
import math
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

import pytest
from transformers import GPT2Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = ["README.md", *(f"docs/{name}.md" for name in ("quickstart", "sizes", "options", "healing", "streaming",
                                                        "large-models", "deployment", "recipes", "paper"))]  # fmt: skip
KEPT: list[dict] = []  # what the guides' Python made: a server of llama.cpp can hang where it is deleted
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^(krony .*?)(?:\s+#.*)?$", re.MULTILINE)
# In place of the pages' numbers, for time.
SMALL = {"--tune": "4", "--reconstruct": "4", "--max-tokens": "8192", "--calibration-tokens": "4096"}
ADDED = {"--calibration": "--calibration-tokens", "--effort": "--tune"}  # where a page leaves the number out
# Texts and models that the guides speak of, made before their commands run.
BEFORE = {"docs/healing.md": ["krony compress gpt2 gpt2-half --scheme keep=0.5 --calibration python-docs"]}
BEFORE["docs/deployment.md"] = BEFORE["docs/streaming.md"] = BEFORE["docs/healing.md"]
BEFORE["docs/large-models.md"] = ["krony compress gpt2 llama-half --scheme keep=0.5 --init van-loan"]
BEFORE["README.md"] = BEFORE["docs/paper.md"] = []
BEFORE["docs/recipes.md"] = BEFORE["docs/quickstart.md"] = BEFORE["docs/options.md"] = BEFORE["docs/sizes.md"] = []


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fenced(name: str, language: str) -> list[str]:
    """The blocks of code in this language."""
    return [code for kind, code in FENCED.findall(page(name)) if kind == language]


@pytest.fixture
def workplace(tmp_path, monkeypatch, tokenizer):
    """A folder where ``gpt2`` is a model of GPT-2 124M's MLPs with little else, and the named sets are files."""
    import torch
    from tokenizers import Tokenizer
    from transformers import GPT2LMHeadModel

    from krony.kronecker import schemes

    monkeypatch.chdir(tmp_path)
    config = GPT2Config(
        n_layer=2, n_embd=48, n_head=4, n_positions=512, vocab_size=258, bos_token_id=256, eos_token_id=256
    )
    torch.manual_seed(0)
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    stored["model"]["vocab"]["th"], stored["model"]["merges"] = 257, [["t", "h"]]  # llama.cpp needs a merge
    own = copy.deepcopy(tokenizer)
    own._tokenizer = Tokenizer.from_str(json.dumps(stored))
    own.unk_token = own.eos_token  # as GPT-2's
    for name in ("gpt2", "smollm2", "llama"):
        GPT2LMHeadModel(config).save_pretrained(name)
        own.save_pretrained(name)
    monkeypatch.setitem(schemes.PAPER_NAMES, "81M", "48x48")
    monkeypatch.setattr(schemes.ModelShape, "is_gpt2", property(lambda layout: layout.matrices == ((192, 48),) * 4))
    for name in [n for n in schemes.PAPER_NAMES if n != "81M"]:
        monkeypatch.delitem(schemes.PAPER_NAMES, name)
    monkeypatch.setattr("krony.sizing.text.HELD_TOKENS", 4096)
    for name, file in [("wikitext-2", "wiki.test.tokens"), ("lambada", "lambada_test_plain_text.txt")]:
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / file).write_text("some words and a last one\n" * 4)
    documents = [json.dumps({"text": f"document {number} has some words to train on. " * 60}) for number in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(documents))
    for part in ("train", "val"):  # which krony data prepare writes
        (tmp_path / f"data/{part}.bin").write_bytes(bytes(2 * 40_000))
    return tmp_path


def run(command: str, monkeypatch, capsys) -> None:
    """The command, as the shell would start it, with small numbers."""
    from krony.cli.app import main

    arguments = shlex.split(command)
    for option, added in ADDED.items():
        if option in arguments and added not in arguments:
            arguments += [added, SMALL[added]]
    for option, value in SMALL.items():
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
    arguments += {"eval": ["--data-dir", "data"], "bench": ["--rounds", "1"]}.get(arguments[1], [])
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr("krony.storage.hub.push", lambda folder, name, **_: f"https://huggingface.co/{name}")
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 0, (command, capsys.readouterr().err)


@pytest.mark.parametrize("name", GUIDES)
def test_every_command_and_all_python_runs(name, workplace, monkeypatch, capsys):
    """The commands in their order, then the Python, which uses what they wrote."""
    from krony.data import sets

    commands = COMMAND.findall("\n".join(fenced(name, "")))
    assert commands
    for text in fenced(name, "yaml"):
        small = text.replace("300000", "8192").replace("eval:\n", "eval:\n  data-dir: data\n")
        named = re.match(r"# (\S+\.yaml)\n", small)
        Path(named[1] if named else "recipe.yaml").write_text(small)
    for command in [*BEFORE[name], *commands]:
        run(command, monkeypatch, capsys)
    monkeypatch.setattr(sets, "_from_hub", lambda name, *_: ["some words"] * 9)
    for code in fenced(name, "python"):
        if "torchao" in code and find_spec("torchao") is None:
            continue  # which only benchmarks install
        KEPT.append({})
        exec(compile(code.replace("300_000", "8_192"), name, "exec"), KEPT[-1])


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_recipe_is_one_that_runs(recipe, workplace, monkeypatch, capsys):
    """Its options are checked; what it takes days to do is tested with small models in tests/cli/test_run_verb.py."""
    run(f"krony run {recipe} --dry-run", monkeypatch, capsys)
    assert "krony compress gpt2 " in capsys.readouterr().out


def results(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))


BEST_OTHER = "optipfair, calibrated"


def quality_lines() -> list[str]:
    """The README's rows on quality, as the measured figures give them."""
    measured = results("quality-smollm2")
    rows = [row for row in measured["rows"] if not row.get("distilled") and row.get("seed", 0) == measured["seed"]]
    half = {row["way"]: row for row in rows if row["removed"] == 0.5}
    shown = {
        "the original": measured["base"],
        "the original with 8-bit weights": measured["int8"],
        "krony": half["neurons"],
        "krony, `--effort tuned --reconstruct 150`": half["neurons, global, reconstructed, all weights tuned"],
        "optipfair with calibration text, the best of the other pruning methods that were measured": half[BEST_OTHER],
        "Van Loan, the start that the paper uses": half["van-loan"],
    }
    others = [row for way, row in half.items() if not way.startswith(("neurons", "svd", "van-loan", "prune"))]
    best = min(others, key=lambda row: row["sets"]["OpenWebText"]["perplexity"])
    assert best["way"] == BEST_OTHER and len(others) >= 5
    made = []
    for name, row in shown.items():
        perplexity = row["sets"]["OpenWebText"]["perplexity"]
        ratio = perplexity / measured["base"]["sets"]["OpenWebText"]["perplexity"]
        size = f"{row['params'] / 1e6:.1f}M | {row['bytes'] / 1e6:.0f}"
        made.append(f"| {name} | {size} | {figure(perplexity)} | {figure(ratio)} |")
    return made


def test_the_sentence_on_distillation_is_measured():
    measured = results("quality-smollm2")
    base = measured["base"]["sets"]["OpenWebText"]["perplexity"]
    losses: dict[str, list[float]] = {}  # of each method, one per seed
    for row in measured["rows"]:
        if row.get("distilled") == 131_072 and row["removed"] == 0.5:
            losses.setdefault(row["way"], []).append(math.log(row["sets"]["OpenWebText"]["perplexity"] / base))
    ends = {way: math.exp(mean(each)) for way, each in losses.items()}
    krony, best = ends.pop("neurons, global"), ends.pop(BEST_OTHER)
    assert best <= min(ends.values(), default=math.inf)  # of the others that were distilled
    sentence = f"krony is at {krony:.2f} times the original's perplexity, and optipfair at {best:.2f}."
    assert sentence in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def speed_lines() -> list[str]:
    """The README's rows on speed, as the measured figures give them."""
    measured = {model["name"]: model["ratio"] for model in results("speed")["models"]}
    shown = {
        "krony, 81M parameters": "krony 81M",
        "krony, 96M parameters": "krony 96M",
        "81M, multiplied out in every call as in the paper's code": "81M multiplied out",
        "DistilGPT2's shape, 82M: half of the layers": "DistilGPT2's shape",
    }
    works = ("prefill", "decode", "train", "peak")
    return [
        f"| {name} | {' | '.join(f'{measured[model][work]:.2f}x' for work in works)} |" for name, model in shown.items()
    ]


@pytest.mark.parametrize("heading, lines", [("Quality", quality_lines), ("Speed", speed_lines)])
def test_the_tables_are_measured(heading, lines):
    """The README shows these rows and no others."""
    part = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    shown = [line for line in part.splitlines() if line.startswith("|")][2:]
    assert shown == lines()


def test_the_figures_in_the_text_are_measured():
    measured = results("quality-smollm2")
    base = measured["base"]["sets"]["OpenWebText"]["perplexity"]
    half = {row["way"]: row for row in measured["rows"] if row["removed"] == 0.5}
    plain, quantised = (
        half[way]["sets"]["OpenWebText"]["perplexity"] / base for way in ("neurons", "neurons, slim, int8")
    )
    bytes, ratio = measured["int8"]["bytes"] / 1e6, measured["int8"]["sets"]["OpenWebText"]["perplexity"] / base
    for words in (
        f"goes from {plain:.2f} to {quantised:.2f}",
        f"({bytes:.0f} MB at {ratio:.2f})",
        f"first {measured['tokens']:,} tokens",
        f"calibrated on {measured['calibration_tokens']:,} tokens",
        measured["model"],
    ):
        assert words in " ".join(README.split()), words
    healed = next(line for line in page("docs/healing.md").splitlines() if line.startswith("| healed |"))
    assert healed.split(" | ")[2] in README.split("original's perplexity](docs/healing.md")[0][-20:]


def test_the_drafts_figures_are_measured():
    """By ``krony bench --draft … --json``, whose output is kept."""
    drafts = results("drafts-smollm2")["drafts"]
    assert [each["drafted"] for each in drafts] == [1, 2, 4] and all(each["same"] == 1 for each in drafts)
    kept = "{:.0%}, {:.0%} and {:.0%}".format(*(each["accepted"] for each in drafts))
    faster = "{:.2f}, {:.2f} and {:.2f}".format(*(each["ratio"] for each in drafts))
    text = " ".join(page("docs/deployment.md").split())
    assert f"{kept} are kept, and decoding is {faster} times as fast" in text


def test_the_table_of_gpt2_is_what_schemes_prints():
    from krony.kronecker import schemes

    layout = schemes.ModelShape(124_439_808, ((3072, 768),) * 24)
    for name in ("96M", "92M", "81M", "80M", "67M"):
        shape = schemes.resolve(name, 3072, 768)
        total = layout.parameters_with(name)
        share = f"{100 * total / layout.parameters:.1f} %"
        row = f"| `{name}` | {shape.m1}x{shape.n1} | {shape.factors} | {total:,} | {share} |"
        assert row in page("docs/options.md")


def test_the_table_of_verbs_is_complete():
    from krony.cli.app import app

    verbs = [command.name for command in app.registered_commands] + [group.name for group in app.registered_groups]
    shown = re.findall(r"^\| `krony (\w+)", README, re.MULTILINE)
    assert sorted(shown) == sorted(verbs)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 125

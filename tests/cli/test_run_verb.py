"""``krony run``: a recipe's steps, how it resumes, and what it refuses."""

import json
import random
import shutil

import pytest
import yaml

from krony.cli.recipe_file import VERBS, option_names, read_recipe
from krony.runtime.signals import Stopped

TEXT = "\n".join(json.dumps({"text": f"document {n} has words to train on. " * 30}) for n in range(40))


@pytest.fixture
def recipe(tmp_path, gpt2_folder, monkeypatch):
    """Writes a recipe for a small model, with changes; a section that is None is left out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text(TEXT)

    def write(**changes):
        parts = {
            "model": str(gpt2_folder),
            "out": "out",
            "compress": {"scheme": "keep=0.5", "init": "van-loan"},
            "heal": {"data": "text.jsonl", "max-tokens": 4096, "keep-anyway": True},
            "eval": {"data": "text.jsonl", "max-tokens": 512},
            "export": {"to": "dense"},
        } | changes
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({k: v for k, v in parts.items() if v}, sort_keys=False))
        return "r.yaml"

    return write


@pytest.fixture
def said(tmp_path, monkeypatch):
    """Reads a recipe from its text, and returns the sentence that refuses it."""
    monkeypatch.chdir(tmp_path)

    def read(text):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"r\.yaml") as error:
            read_recipe(tmp_path / "r.yaml")
        return str(error.value).replace(f"{tmp_path}/", "")

    return read


def test_the_steps_run_and_leave_models_and_figures(krony, recipe, tmp_path, gpt2_folder):
    done = krony("run", recipe())
    assert done.code == 0, done.err
    out = tmp_path / "out"
    assert {"compressed", "healed", "dense", "figures.json", "recipe.yaml", "requirements.txt"} == {
        path.name for path in out.iterdir()
    }
    assert (out / "recipe.yaml").read_text() == (tmp_path / "r.yaml").read_text()
    assert "transformers==" in (out / "requirements.txt").read_text()
    figures = json.loads((out / "figures.json").read_text())
    steps = figures["steps"]
    assert figures["model"] == str(gpt2_folder)
    assert list(steps) == ["compressed", "healed", "eval-original", "eval", "dense"]
    # each verb's own figures, of the model that the step before made
    assert steps["healed"]["figures"]["model"] == "out/compressed"
    assert [steps[name]["figures"]["model"] for name in ("eval-original", "eval")] == [str(gpt2_folder), "out/healed"]
    before, after = (steps[name]["figures"]["results"][0]["perplexity"] for name in ("eval-original", "eval"))
    row = next(line for line in done.out.splitlines() if line.strip().startswith("text.jsonl") and "paper" not in line)
    assert row.split()[1:] == [f"{before:,.2f}", f"{after:,.2f}", f"{after / before:.3f}"]


def test_the_commands_that_a_run_says_do_the_same(krony, recipe, tmp_path):
    """What --dry-run prints, typed one by one, gives the same model."""
    name = recipe(heal=None, eval=None)
    assert krony("run", name).code == 0
    made = (tmp_path / "out/dense/model.safetensors").read_bytes()
    (tmp_path / "out").rename(tmp_path / "before")
    commands = krony("run", name, "--dry-run").out.splitlines()
    assert not (tmp_path / "out").exists()
    for command in commands:
        assert krony(*command.split()[1:]).code == 0
    assert (tmp_path / "out/dense/model.safetensors").read_bytes() == made


def test_what_is_done_is_not_done_again(krony, recipe, tmp_path):
    assert krony("run", recipe(heal=None)).code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    again = krony("run", recipe(heal=None, export=[{"to": "dense"}, {"to": "reference"}]))
    assert again.code == 0, again.err
    assert again.out.count("done before") == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (tmp_path / "out/reference.pt").is_file()


def test_a_run_that_was_stopped_continues(krony, recipe, tmp_path, monkeypatch):
    from krony.cli import heal

    real, stops = heal._Job.train, [True]

    def stopping(job, *arguments):
        if stops.pop():
            (tmp_path / "out/healed.work").mkdir(exist_ok=True)
            raise Stopped(15, "the last checkpoint is there")
        return real(job, *arguments)

    monkeypatch.setattr(heal._Job, "train", stopping)
    stopped = krony("run", recipe(eval=None, export=None))
    assert stopped.code == 143
    assert "r.yaml, line 6: heal is not finished: krony run r.yaml continues there" in stopped.err
    stops.append(False)
    again = krony("run", recipe(eval=None, export=None))
    assert again.code == 0, again.err
    assert "1/2 compressed: done before" in again.out
    assert (tmp_path / "out/healed/model.safetensors").is_file()


def test_a_run_that_was_stopped_in_its_first_step_continues(krony, recipe, tmp_path, monkeypatch):
    from krony.cli.compress_job import Job

    def stopping(job, *_):
        raise Stopped(15, "nothing is written")

    with monkeypatch.context() as patch:
        patch.setattr(Job, "one_size", stopping)
        stopped = krony("run", recipe(heal=None, eval=None, export=None))
    assert stopped.code == 143 and "compress is not finished: krony run r.yaml continues there" in stopped.err
    again = krony("run", recipe(heal=None, eval=None, export=None))
    assert again.code == 0, again.err
    assert (tmp_path / "out/compressed/model.safetensors").is_file()


def test_a_model_that_no_record_explains_is_not_taken_and_not_deleted(krony, refused, recipe, tmp_path):
    assert krony("run", recipe(heal=None, eval=None, export=None)).code == 0
    (tmp_path / "out/figures.json").write_text(json.dumps({"steps": {}}))
    assert "compressed is there, and figures.json does not say how it was made" in refused("run", "r.yaml")
    assert (tmp_path / "out/compressed/model.safetensors").is_file()


def test_a_promise_that_is_not_kept_ends_the_run(krony, recipe, tmp_path):
    """It trains on one text and is validated on another, which shares no character with it."""
    noise = random.Random(0).choices("!@#$%^&*()_+=;?", k=4000)
    (tmp_path / "noise.jsonl").write_text(json.dumps({"text": "".join(noise)}))
    section = {"data": "text.jsonl", "val": "noise.jsonl", "max-tokens": 4096, "learning-rate": 0.01}
    done = krony("run", recipe(heal=section))
    assert done.code == 1
    assert "r.yaml, line 6: heal: training did not improve the model" in done.err
    assert "--keep-anyway" in done.err and "in a recipe an option is a key" in done.err
    steps = json.loads((tmp_path / "out/figures.json").read_text())["steps"]
    assert list(steps) == ["compressed"]


def test_another_recipe_does_not_continue_a_run(krony, refused, recipe, tmp_path):
    assert krony("run", recipe(heal=None, eval=None, export=None)).code == 0
    other = recipe(compress={"scheme": "keep=0.25", "init": "van-loan"}, heal=None, eval=None, export=None)
    assert "its step compressed was made by krony compress" in refused("run", other)
    same = recipe(heal=None, eval={"data": "text.jsonl"}, export=None)
    assert krony("run", same).code == 0
    (tmp_path / "text.jsonl").write_text(TEXT.replace("words", "other words"))
    assert "made from text.jsonl, which has changed since" in refused("run", same)


def test_another_model_does_not_continue_a_run(krony, refused, recipe, tmp_path, gpt2_folder):
    shutil.copytree(gpt2_folder, "own")
    name = recipe(model="own", heal=None, eval=None, export=None)
    assert krony("run", name).code == 0
    shutil.rmtree("own")
    assert krony("compress", gpt2_folder, "own", "--scheme", "keep=0.25", "--init", "van-loan").code == 0
    assert "made from own, which has changed since" in refused("run", name)


def test_another_test_set_does_not_continue_a_run(krony, refused, recipe, tmp_path):
    """It lies in a folder of the data folder; what else is there does not matter."""
    (tmp_path / "sets/wikitext-2").mkdir(parents=True)
    file = tmp_path / "sets/wikitext-2/wiki.test.tokens"
    file.write_text("a text to measure on\n" * 20)
    name = recipe(compress=None, heal=None, export=None, eval={"data": "wikitext-2", "data-dir": "sets"})
    done = krony("run", name)
    assert done.code == 0 and done.out.splitlines()[-1] == "out holds figures.json", done.err
    (tmp_path / "sets/other.txt").write_text("not measured")
    assert "eval: done before" in krony("run", name).out
    file.write_text("another text to measure on\n" * 20)
    assert f"made from {file.relative_to(tmp_path)}, which has changed since" in refused("run", name)


def test_out_in_the_models_folder(krony, recipe, tmp_path, gpt2_folder):
    """Its lock lies in the folder of the model while it runs."""
    shutil.copytree(gpt2_folder, "own")
    name = recipe(model="own", out="own/out", heal=None, eval=None, export=None)
    assert krony("run", name).code == 0
    assert "compressed: done before" in krony("run", name).out


def test_an_option_that_is_longer_than_a_files_name(krony, recipe):
    layers = "|".join(f"transformer.h.{n}.mlp" for n in range(20))
    compress = {"scheme": "keep=0.5", "init": "van-loan", "modules": layers}
    done = krony("run", recipe(compress=compress, heal=None, eval=None, export=None))
    assert done.code == 0, done.err


@pytest.mark.parametrize("content", ['{"a": 1}', '{"steps": {"eval": {}}}', '{"steps"', "[]"])
def test_figures_that_no_run_wrote(refused, recipe, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/figures.json").write_text(content)
    assert refused("run", recipe()).startswith("error: out/figures.json")


def test_a_folder_of_others_is_left_alone(refused, recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    assert "out is not empty, and no run of a recipe began it" in refused("run", recipe())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"compress": {"scheme": "keep=0.5", "init": "nothing"}}, "line 3: compress: init"),
        ({"compress": {"init": "van-loan"}}, "line 3: compress: compress needs one size"),
        ({"compress": {"scheme": "keep=0.5"}}, "line 3: compress: init neurons needs text"),
        ({"heal": {"data": "text.jsonl", "recipe": "slow"}}, "line 6: heal: recipe 'slow' is unknown"),
        ({"heal": {"data": "text.jsonl", "temperature": 2.0}}, "line 6: heal: --temperature works with a teacher"),
        ({"heal": {"max-tokens": 9}}, "line 6: heal needs data"),
        ({"eval": {"count": "twice"}}, "line 10: eval: --count twice"),
        ({"eval": {"tasks": "piqa", "max-tokens": 9}}, "line 10: eval: --max-tokens works with --data"),
        ({"export": {"to": "paper"}}, "line 13: export: export to 'paper' is unknown"),
        ({"export": [{"to": "dense"}, {"to": "dense"}]}, "line 14: two exports to dense"),
        ({"compress": {"scheme": "keep=0.5", "calibration": "none.txt"}}, "line 3: compress: none.txt can't be read"),
        ({"heal": {"data": "a:b:c"}}, "line 6: heal: 'a:b:c' names no data set"),
        ({"heal": {"data": "text.jsonl", "teacher": "nobody"}}, "nobody: there is no such folder"),
        (
            {"compress": {"scheme": "keep=0.5", "init": "svd", "calibration": "text.jsonl"}, "export": {"to": "slim"}},
            "export: slim leaves out neurons that init neurons with epsilon 0 drops, and here compress has init svd",
        ),
        (
            {
                "compress": {"scheme": "keep=0.5", "layers": "odd", "calibration": "text.jsonl"},
                "export": {"to": "slim"},
            },
            "export: slim needs every MLP compressed, and here compress has layers odd",
        ),
        (
            {
                "compress": {"scheme": "keep=0.5", "calibration": "text.jsonl"},
                "heal": {"data": "text.jsonl", "recipe": "paper"},
                "export": {"to": "slim"},
            },
            "export: slim leaves out neurons that healing brings back if it trains the right factors: freeze: right",
        ),
    ],
)
def test_mistakes_are_found_before_any_work(refused, recipe, tmp_path, changes, sentence):
    """Also those of the last step, which would otherwise come after hours."""
    assert sentence in refused("run", recipe(**changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "r.yaml is empty"),
        ("~\n", "r.yaml names no model"),
        ("- a\n", "line 1: a recipe has the keys"),
        ("model: demo\n  out: x\n", "line 2: this is no YAML"),
        ("model: demo\nout: x\n", "says nothing to do"),
        ("out: x\ncompress: {scheme: keep=0.5}\n", "names no model: it needs a line such as model: demo"),
        ("model: demo\ncompress: {scheme: keep=0.5}\n", "names no out"),
        ("model: demo\nout:\ncompress: {scheme: keep=0.5}\n", "names no out"),
        ("model: [demo]\nout: x\ncompress:\n", "line 1: model is a name"),
        ("model: demo\nout: x\nbench:\n  rounds: 1\n", "line 4: bench: it is one of model, out, compress"),
        ("model: demo\nout: x\nmodel: y\n", "line 3: model is there twice"),
        ("model: demo\nout: x\ncompress: keep=0.5\n", "line 3: compress needs options"),
        (
            "model: demo\nout: x\ncompress:\n  scheme: a\n  seeds: 1\n",
            "line 5: seeds: krony compress has no such option: did you mean seed?",
        ),
        ("model: demo\nout: x\ncompress:\n  seed: one\n", "line 4: seed: one: input should be a valid integer"),
        ("model: demo\nout: x\ncompress:\n  seed: 1.5\n", "line 4: seed: 1.5: input should be a valid integer"),
        ("model: demo\nout: x\ncompress:\n  cache: 7\n", "line 4: cache: 7: input should be a valid boolean"),
        ("model: demo\nout: x\ncompress:\n  json: f\n", "line 4: json: a run sets this itself"),
        (
            "model: demo\nout: x\ncompress:\n  scheme:\n    a: b\n",
            "line 5: scheme takes a value, and this is a mapping: name a file",
        ),
        ("model: demo\nout: x\nheal:\n  data: [a, b]\n", "line 4: data: ['a', 'b']: input should be a valid string"),
        ("model: demo\nout: x\nheal:\n  data: {a: b}\n", "line 4: data"),
        ("model: demo\nout: x\nheal:\n  data: a\n  max-tokens: 0\n", "line 5: max-tokens: 0: input should be greater"),
        ("model: demo\nout: x\nexport:\n- to: slim\n- two: slim\n", "line 5: two: krony export has no such option"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(said, text, sentence):
    assert sentence in said(text)


def test_tags_are_not_acted_on(tmp_path):
    """A recipe of somebody else's runs no code: the value is its text."""
    file = tmp_path / "r.yaml"
    file.write_text("model: !!python/object/apply:os.getcwd x\nout: y\nexport:\n  to: slim\n")
    assert read_recipe(file).model == "x"


def test_values_are_what_the_command_line_would_get(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(
        "model: demo\nout: 1e3\ncompress:\n  within: 5%\n  epsilon: 1e-4\n  cache: no\n  layers: 010\n  params: null\n"
        "  tune-all: false\nheal:\n  data: on\neval:\n  data: one\n"
    )
    recipe = read_recipe(file)
    assert str(recipe.out) == "1e3"
    compress, heal, evaluate = recipe.sections
    assert compress.options == {"within": "5%", "epsilon": 1e-4, "cache": False, "layers": "010"}
    assert compress.arguments() == ["--within", "5%", "--epsilon", "0.0001", "--no-cache", "--layers", "010"]
    assert heal.options == {"data": "on"}
    assert evaluate.options == {"data": ["one"]}


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_a_verb_is_a_key(verb):
    """A recipe takes all options but those that a run sets itself."""
    from typer.main import get_command

    from krony.cli.app import app

    options = [param.opts for param in get_command(app).commands[verb].params if param.opts[0].startswith("--")]
    own = {"json", "dry-run", "world-size", "resume", "report", "help"}
    expected = {names[0].removeprefix("--") for names in options} - own
    assert set(option_names(verb).values()) == expected


@pytest.mark.parametrize(
    "command",
    [
        "compress demo out --scheme keep=0.5 --no-cache --tune 0 --epsilon 0.0001",
        "heal a out --data text.jsonl --teacher demo --freeze right --max-tokens 7",
        "export a out --to gguf --type f32",
        "eval a --data x --data y --max-tokens 5",
    ],
)
def test_print_writes_what_runs_as_the_command(command, krony, tmp_path):
    verb, model, *rest = command.split()
    file = tmp_path / "r.yaml"
    file.write_text(krony("run", "--print", *command.split()).out)
    recipe = read_recipe(file)
    (section,) = recipe.sections
    assert (section.verb, recipe.model, recipe.out.name) == (verb, model, f"{model}-run" if verb == "eval" else "out")
    assert section.arguments() == (rest if verb == "eval" else rest[1:])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--print", "bench", "demo"], "bench can't be in a recipe"),
        (["--print", "compress", "demo", "out", "--dry-run"], "--dry-run is no part of a recipe"),
        (["--print", "heal", "a", "b", "--data", "c", "--resume"], "--resume is no part of a recipe"),
        (["nothing.yaml"], "nothing.yaml can't be read"),
        (["r.yaml", "--scheme", "keep=0.5"], "--scheme: krony run takes a recipe and nothing else"),
    ],
)
def test_what_run_refuses(refused, words, sentence):
    assert sentence in refused("run", *words)


def test_several_processes_are_refused(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "krony run is one process" in refused("run", "r.yaml")


def test_a_large_file_is_no_recipe(refused, tmp_path):
    (tmp_path / "r.yaml").write_text("#" * (1 << 21))
    assert "is no recipe: it is larger" in refused("run", tmp_path / "r.yaml")


def test_names_are_printed_as_they_are_written(krony, refused, tmp_path, recipe):
    """A colon on both sides of a word is an emoji to the library that prints."""
    name = recipe(out="d:x:out", heal=None, eval=None)
    assert "krony compress" in (said := krony("run", name, "--dry-run").out) and "d:x:out/compressed" in said
    assert "'a:b:c'" in refused("compress", "demo", tmp_path / "out", "--scheme", "keep=0.5", "--calibration", "a:b:c")

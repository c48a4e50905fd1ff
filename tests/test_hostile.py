"""Broken and hostile input: exit code 2, one sentence that names the file, and nothing left behind; for every verb."""

import copy
import json
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import krony
from krony import KronyConfig, KronyError
from krony.cli.app import main
from krony.models.loading import load_model
from krony.models.source import ModelSource
from krony.storage.files import fresh_folder
from small_models import gpt2

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tokenizer):
    """A dense model and a compressed one, each with a tokenizer, and a text."""
    home = tmp_path_factory.mktemp("sound")
    model = gpt2(n_layer=2)
    model.save_pretrained(home / "dense", max_shard_size="150KB")
    assert (home / "dense" / INDEX).exists()
    krony.compress(model, KronyConfig("keep=0.5", init="van-loan"))
    model.save_pretrained(home / "compressed")
    for name in ("dense", "compressed"):
        tokenizer.save_pretrained(home / name)
    (home / "text.txt").write_text("all is well that ends well " * 40)
    return home


@pytest.fixture
def place(sound, tmp_path):
    """A copy to damage."""
    shutil.copytree(sound, tmp_path / "place")
    return tmp_path / "place"


def verbs(place: Path) -> dict[str, list[str]]:
    dense, compressed = str(place / "dense"), str(place / "compressed")
    out, text = str(place / "out"), str(place / "text.txt")
    return {
        "inspect": ["inspect", compressed],
        "eval": ["eval", compressed, "--data", text],
        "generate": ["generate", compressed, "--prompt", "a"],
        "export": ["export", compressed, out],
        "heal": ["heal", compressed, out, "--data", text, "--length", "32", "--epochs", "1"],
        "compress": ["compress", dense, out, "--scheme", "keep=0.5", "--init", "van-loan", "--no-stream"],
        "stream": ["compress", dense, out, "--scheme", "keep=0.5", "--init", "van-loan", "--stream"],
        "calibrated": ["compress", dense, out, "--scheme", "keep=0.5", "--calibration", text, "--stream"],
    }


def refused(arguments: list[str], place: Path, monkeypatch, capsys, named: str) -> str:
    """Runs the command line, which must refuse: what it says."""
    before = sorted(str(p.relative_to(place)) for p in place.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["krony", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert stopped.value.code == 2, said
    assert len(lines) == 1 and "Traceback" not in said
    assert named in lines[0]
    assert sorted(str(p.relative_to(place)) for p in place.rglob("*")) == before
    return lines[0]


def weights(folder: Path) -> Path:
    """The file that a damage goes to: the first shard, or the only file."""
    return next(file for file in sorted(folder.glob("*.safetensors")) if not file.is_dir())


def rewritten(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def header(file: Path, change) -> None:
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    said = json.loads(raw[8 : 8 + length])
    change(said)
    text = json.dumps(said).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def mlp(tensors: dict) -> str:
    return next(name for name in tensors if "mlp.c_fc.weight" in name)


class Loud:
    """A pickle that says so when it is read."""

    def __reduce__(self):
        return os.system, ("touch /tmp/krony-was-here",)


WEIGHTS = {
    "cut short": lambda f: f.write_bytes(f.read_bytes()[:-100]),
    "cut in the header": lambda f: f.write_bytes(f.read_bytes()[:60]),
    "three bytes": lambda f: f.write_bytes(b"abc"),
    "empty": lambda f: f.write_bytes(b""),
    "too long": lambda f: f.write_bytes(f.read_bytes() + b"more"),
    "a header that is too long": lambda f: f.write_bytes(struct.pack("<Q", 2**60) + f.read_bytes()[8:]),
    "a pickle": lambda f: f.write_bytes(pickle.dumps(Loud())),
    "a torch file": lambda f: torch.save({"a": torch.ones(2)}, f),
    "a pointer": lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
    "not JSON": lambda f: f.write_bytes(f.read_bytes()[:8] + b"?" + f.read_bytes()[9:]),
    "another dtype's name": lambda f: header(
        f, lambda h: next(v for k, v in h.items() if "mlp" in k).update(dtype="X")
    ),
    "a negative size": lambda f: header(f, lambda h: next(v for k, v in h.items() if "mlp" in k).update(shape=[-1, 4])),
    "overlapping": lambda f: header(f, lambda h: [v.update(data_offsets=[0, 4]) for k, v in h.items() if "mlp" in k]),
    "NaN": lambda f: rewritten(f, lambda t: t[mlp(t)].view(-1)[5:6].fill_(float("nan"))),
    "infinite": lambda f: rewritten(f, lambda t: next(v for k, v in t.items() if "ln_1" in k)[:1].fill_(float("inf"))),
    "another shape": lambda f: rewritten(f, lambda t: t.update({mlp(t): t[mlp(t)].flatten()})),
    "whole numbers": lambda f: rewritten(f, lambda t: t.update({mlp(t): t[mlp(t)].int()})),
}


@pytest.mark.parametrize("damage", list(WEIGHTS))
@pytest.mark.parametrize("verb", ["inspect", "stream"])
def test_damaged_weights(damage, verb, place, monkeypatch, capsys):
    for folder in (place / "dense", place / "compressed"):
        WEIGHTS[damage](weights(folder))
    named = weights(place / ("compressed" if verb == "inspect" else "dense"))
    finite = damage in ("NaN", "infinite") and verb == "inspect"  # found in the loaded model, which has no files
    refused(verbs(place)[verb], place, monkeypatch, capsys, str(named.parent if finite else named))
    assert not Path("/tmp/krony-was-here").exists()


@pytest.mark.parametrize("damage", ["cut short", "a pickle", "NaN", "another shape"])
@pytest.mark.parametrize("verb", ["eval", "generate", "export", "heal", "compress", "calibrated"])
def test_every_verb_refuses_damaged_weights(damage, verb, place, monkeypatch, capsys):
    for folder in (place / "dense", place / "compressed"):
        WEIGHTS[damage](weights(folder))
    refused(verbs(place)[verb], place, monkeypatch, capsys, str(place))


@pytest.mark.parametrize("damage", ["cut short", "a pickle", "NaN", "another shape"])
@pytest.mark.parametrize("role", ["the first", "the second", "base", "teacher", "control", "table's"])
def test_every_model_that_a_verb_reads_is_looked_at(damage, role, place, monkeypatch, capsys):
    """The other one is sound."""
    dense, known = str(place / "dense"), verbs(place)
    arguments = {
        "the first": ["bench", dense, "--scheme", "keep=0.5"],
        "the second": ["bench", str(place / "compressed"), dense],
        "base": [*known["inspect"], "--base", dense],
        "teacher": [*known["heal"], "--teacher", dense],
        "control": [*known["heal"], "--control", dense],
        "table's": ["reproduce", "table4", "--model", dense],
    }[role]
    WEIGHTS[damage](weights(place / "dense"))
    refused(arguments, place, monkeypatch, capsys, dense)


def changed(name: str, change) -> None:
    def damage(folder: Path) -> None:
        said = json.loads((folder / name).read_text())
        change(said)
        (folder / name).write_text(json.dumps(said))

    return damage


def all_to(name: str):
    return changed(INDEX, lambda i: i["weight_map"].update(dict.fromkeys(i["weight_map"], name)))


FOLDERS = {
    "a shard that is missing": lambda d: weights(d).unlink(),
    "an index without a map": changed(INDEX, lambda i: i.pop("weight_map")),
    "an index of a list": changed(INDEX, lambda i: i.update(weight_map=["a"])),
    "an index of numbers": changed(INDEX, lambda i: i.update(weight_map={"a": 1})),
    "an empty index": changed(INDEX, lambda i: i.update(weight_map={})),
    "an index that is not JSON": lambda d: (d / INDEX).write_text("{"),
    "an index of other tensors": changed(
        INDEX, lambda i: i["weight_map"].update(x=next(iter(i["weight_map"].values())))
    ),
    "a way up": all_to("../compressed/model.safetensors"),
    "a way up from below": all_to("a/../../compressed/model.safetensors"),
    "an absolute name": all_to("/etc/passwd.safetensors"),
    "a Windows way up": all_to("..\\compressed\\model.safetensors"),
    "a NUL": all_to("a\0.safetensors"),
    "a pickle's name": all_to("pytorch_model.bin"),
    "a shard that is a folder": all_to("sub.safetensors"),
    "a link out": lambda d: (weights(d).rename(d.parent / "moved"), weights_link(d)),
    "an index that links out": lambda d: ((d / INDEX).rename(d.parent / "i"), (d / INDEX).symlink_to(d.parent / "i")),
    "no weights": lambda d: [f.unlink() for f in d.glob("model*.safetensors*")],
    "an adapter": lambda d: (d / "adapter_config.json").write_text('{"base_model_name_or_path": "../compressed"}'),
    "no config": lambda d: (d / "config.json").unlink(),
    "an empty config": lambda d: (d / "config.json").write_text(""),
    "a config of a list": lambda d: (d / "config.json").write_text("[]"),
    "a deep config": lambda d: (d / "config.json").write_text("[" * 100_000),
    "a config of bytes": lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"),
    "a config that links out": lambda d: ((d / "config.json").rename(d.parent / "c"), link(d / "config.json", "c")),
    "code of its own": changed("config.json", lambda c: c.update(model_type="x", auto_map={"AutoConfig": "evil.Evil"})),
    "attention from the hub": changed("config.json", lambda c: c.update(_attn_implementation="evil/attention")),
    "other weights": changed("config.json", lambda c: c.update(transformers_weights="../compressed/model.safetensors")),
    "no kind": changed("config.json", lambda c: c.pop("model_type")),
    "an unknown kind": changed("config.json", lambda c: c.update(model_type="gpt-99")),
    "no causal model": changed("config.json", lambda c: c.update(model_type="vit")),
    "many layers": changed("config.json", lambda c: c.update(n_layer=10**9)),
    "a layer too many": changed("config.json", lambda c: c.update(n_layer=3)),
    "no layer": changed("config.json", lambda c: c.update(n_layer=0)),
    "half a layer": changed("config.json", lambda c: c.update(n_layer=1.5)),
    "layers in words": changed("config.json", lambda c: c.update(n_layer="two")),
    "no heads": changed("config.json", lambda c: c.update(n_head=0)),
    "heads that do not divide": changed("config.json", lambda c: c.update(n_head=7)),
    "a huge width": changed("config.json", lambda c: c.update(n_embd=10**30)),
    "another width": changed("config.json", lambda c: c.update(n_embd=64)),
    "a huge context": changed("config.json", lambda c: c.update(n_positions=2**31)),
    "an unknown activation": changed("config.json", lambda c: c.update(activation_function="os.system")),
    "an unknown dtype": changed("config.json", lambda c: c.update(dtype="float7")),
}


def link(path: Path, to: str) -> None:
    path.symlink_to(path.parent.parent / to)


def weights_link(folder: Path) -> None:
    name = json.loads((folder / INDEX).read_text())["weight_map"].values()
    missing = next(n for n in sorted(set(name)) if not (folder / n).exists())
    (folder / missing).symlink_to(folder.parent / "moved")


@pytest.mark.parametrize("damage", list(FOLDERS))
@pytest.mark.parametrize("verb", ["compress", "stream"])
def test_damaged_folders(damage, verb, place, monkeypatch, capsys):
    (place / "dense/sub.safetensors").mkdir()
    FOLDERS[damage](place / "dense")
    refused(verbs(place)[verb], place, monkeypatch, capsys, "dense")


def test_schemes_reads_configs_alone_and_refuses_the_odd_ones(place, monkeypatch, capsys):
    changed("config.json", lambda c: c.update(n_layer=10**9))(place / "dense")
    refused(["schemes", str(place / "dense")], place, monkeypatch, capsys, "config.json: n_layer is 1000000000")


def test_code_of_a_model_that_transformers_knows_is_not_run(place, monkeypatch):
    """With auto_map beside a known model_type, transformers' own class is taken."""
    (place / "compressed/evil.py").write_text("raise SystemExit('ran')")
    change = changed(
        "config.json", lambda c: c.update(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    )
    change(place / "compressed")
    assert type(load_model(str(place / "compressed"))).__name__ == "GPT2LMHeadModel"


def test_a_link_within_the_folder_and_the_hubs_blobs_are_fine(place, tmp_path):
    """The hub's cache: snapshots/REVISION/model.safetensors links to blobs/HASH."""
    (tmp_path / "hub/blobs").mkdir(parents=True)
    shutil.copytree(place / "compressed", tmp_path / "hub/snapshots/abc")
    for number, file in enumerate(sorted((tmp_path / "hub/snapshots/abc").iterdir())):
        file.rename(tmp_path / f"hub/blobs/{number}")
        file.symlink_to(f"../../blobs/{number}")
    assert load_model(str(tmp_path / "hub/snapshots/abc"))


TEXTS = {
    "half a surrogate pair": ("t.jsonl", b'{"text": "a \\ud800 b"}\n', "line 1"),
    "a deep line": ("t.jsonl", b"[" * 100_000, "line 1"),
    "no text": ("t.jsonl", b'{"text": 3}\n', "line 1"),
    "not UTF-8": ("t.txt", b"abc \xff\xfe", "not UTF-8"),
    "empty": ("t.txt", b" \n", "empty"),
    "a pickle": ("t.jsonl", pickle.dumps(Loud()), "t.jsonl"),
}


@pytest.mark.parametrize("kind", list(TEXTS))
@pytest.mark.parametrize("verb", ["eval", "heal", "calibrated"])
def test_damaged_text(kind, verb, place, monkeypatch, capsys):
    name, content, words = TEXTS[kind]
    (place / name).write_bytes(content)
    arguments = [str(place / name) if a.endswith("text.txt") else a for a in verbs(place)[verb]]
    assert words in refused(arguments, place, monkeypatch, capsys, name)


def test_text_with_nuls_is_text(place, monkeypatch, capsys):
    (place / "text.txt").write_bytes(b"a\0b\0\0 c\n" * 200)
    monkeypatch.setattr(sys, "argv", ["krony", *verbs(place)["calibrated"]])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code and load_model(str(place / "out"))


def test_a_line_of_100_mb_is_read_in_pieces(place, monkeypatch, capsys):
    with (place / "text.txt").open("wb") as stream:
        for _ in range(100):
            stream.write(b"all is well that " * 58_824)  # 1 MB
    arguments = [*verbs(place)["calibrated"], "--calibration-tokens", "4096"]
    monkeypatch.setattr(sys, "argv", ["krony", *arguments])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code and (place / "out").is_dir()


def test_long_text_gives_the_tokens_it_always_gave(tokenizer, monkeypatch):
    from krony.data import sets

    text = "well, all is\nwell that  ends well " * 300
    whole = sets.join_documents([text], tokenizer)
    monkeypatch.setattr(sets._pieces, "__defaults__", (1000,))
    assert torch.equal(sets.join_documents([text], tokenizer), whole)
    assert len(list(sets._pieces("a" * 2500))) == 3


def test_a_prompt_that_is_no_text(place, monkeypatch, capsys):
    arguments = ["generate", str(place / "compressed"), "--prompt", "a\udcff"]
    refused(arguments, place, monkeypatch, capsys, "--prompt is not UTF-8")


@pytest.mark.parametrize("verb", ["export", "compress", "stream", "calibrated"])
def test_a_place_that_can_not_be_written(verb, place, monkeypatch, capsys):
    arguments = ["/proc/krony/out" if a.endswith("/out") else a for a in verbs(place)[verb]]
    refused(arguments, place, monkeypatch, capsys, "/proc/krony/out")


@pytest.mark.parametrize("verb", ["export", "compress", "stream", "calibrated"])
def test_a_full_disk(verb, place, monkeypatch, capsys):
    """As a process meets it whose files may not grow beyond 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        refused([*verbs(place)[verb]], place, monkeypatch, capsys, str(place))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_ctrl_c_leaves_nothing_of_a_model_that_is_being_saved(place, monkeypatch):
    monkeypatch.setattr("krony.cli.compress_job.model_card", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    before = sorted(place.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["krony", *verbs(place)["compress"]])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130 and sorted(place.rglob("*")) == before


def test_what_a_killed_process_left_is_cleared_away_by_the_next(place, monkeypatch):
    """A half-written folder that no living process holds."""
    code = "import os, signal, sys; from pathlib import Path; from krony.storage.files import fresh_folder\n"
    code += "with fresh_folder(Path(sys.argv[1])) as f: (f / 'a').write_text('b'); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(place / "out")], check=False)
    assert len(list(place.glob(".out.partial-*"))) == 1
    living = ["os.kill(os.getpid(), signal.SIGKILL)", "print(flush=True); sys.stdin.read()"]
    process = subprocess.Popen(
        [sys.executable, "-c", code.replace(*living), str(place / "out")], stdin=-1, stdout=-1, text=True
    )
    process.stdout.readline()
    theirs = list(place.glob(".out.partial-*"))
    assert len(theirs) == 1  # the killed one's is gone, the living one's stays
    with pytest.raises(KronyError, match=f"out is in use by process {process.pid} on "), fresh_folder(place / "out"):
        pass
    assert list(place.glob(".out.partial-*")) == theirs
    process.kill()
    process.wait()
    with fresh_folder(place / "out"):
        assert not theirs[0].exists()
    assert not list(place.glob(".*partial*"))


def runs(folder: Path) -> None:
    """The model loads and runs, or one sentence says why not."""
    try:
        model = load_model(str(folder))
    except KronyError as error:
        assert str(folder) in str(error) or "config.json" in str(error)
        return
    model(torch.zeros(1, 4, dtype=torch.long))


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 300), st.floats(), st.text(max_size=8),
    st.sampled_from(["gelu", "relu", "llama", "opt", "mixtral", "krony", "gptq", "float16", "int8", "eager", "auto"]),
    st.lists(st.integers(-3, 100), max_size=3), st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip


def places(config, prefix=()) -> list[tuple]:
    """Where in a config a value stands."""
    found = []
    for key, value in config.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += places(value, (*prefix, key))
    return found


def config_is_fuzzed(folder: Path, cases: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    where = places(config)
    more = [
        ("n_inner",),
        ("rope_scaling",),
        ("layer_types",),
        ("dtype",),
        ("torch_dtype",),
        ("auto_map",),
        ("pruned_heads",),
    ]

    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.sampled_from(where + more), VALUES, st.booleans()), min_size=1, max_size=3))
    def fuzz(changes):
        made = copy.deepcopy(config)
        for path, value, drop in changes:
            inner = made
            for key in path[:-1]:
                inner = inner.get(key) if isinstance(inner, dict) else None
            if not isinstance(inner, dict):
                continue
            if drop:
                inner.pop(path[-1], None)
            else:
                inner[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(made))
        runs(folder)

    fuzz()


def bytes_are_flipped(folder: Path, cases: int) -> None:
    file = folder / SINGLE
    raw = file.read_bytes()
    head = 8 + struct.unpack("<Q", raw[:8])[0]
    draw = random.Random(0)
    for case in range(cases):
        made = bytearray(raw)
        for _ in range(draw.choice([1, 1, 4])):
            made[draw.randrange(head if case % 2 else len(raw))] ^= 1 << draw.randrange(8)
        if case % 10 == 0:
            made = made[: draw.randrange(len(made))]
        file.write_bytes(made)
        runs(folder)


def test_a_fuzzed_config_gives_a_model_or_a_sentence(place):
    config_is_fuzzed(place / "compressed", 200)


def test_flipped_bytes_give_a_model_or_a_sentence(place):
    bytes_are_flipped(place / "compressed", 200)


@pytest.mark.slow
def test_a_config_fuzzed_long(place):
    config_is_fuzzed(place / "compressed", 2000)


@pytest.mark.slow
def test_many_flipped_bytes(place):
    bytes_are_flipped(place / "compressed", 2000)


def test_the_config_alone_is_enough_to_refuse(place):
    changed("config.json", lambda c: c.update(n_head="four"))(place / "dense")
    with pytest.raises(KronyError, match=r"config\.json: n_head is 'four': it takes a whole number from 1"):
        ModelSource.find(str(place / "dense"))

"""The steps that a recipe takes, each a verb of krony; what is done is written down, so that a run resumes."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from krony.cli.output import Output
from krony.cli.recipe_checks import MODELS, check_slim, check_texts, values
from krony.cli.recipe_file import VERBS, Recipe, Section
from krony.config import KronyConfig
from krony.data.sets import STANDARD, TEST_SETS
from krony.errors import KronyError
from krony.models.source import ModelSource
from krony.pages import Table
from krony.runtime.hardware import machine
from krony.runtime.signals import Stopped
from krony.storage.files import write_json, write_text
from krony.storage.locks import WORK
from krony.storage.tensor_files import read_json

NAMED_BY = ("to", "type", "multiple-of")  # options of an export, from which its folder is named
RECIPE, FIGURES, VERSIONS = "recipe.yaml", "figures.json", "requirements.txt"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One verb that is run.

    Attributes:
        name: of its folder in OUT and of its figures.
        section: its options.
        model: MODEL of the verb.
        out: OUT of the verb; None for one that writes no folder.
    """

    name: str
    section: Section
    model: str
    out: Path | None

    @property
    def words(self) -> list[str]:
        """The command without the options that a run adds."""
        return [
            self.section.verb,
            self.model,
            *([] if self.out is None else [str(self.out)]),
            *self.section.arguments(),
        ]

    @property
    def command(self) -> str:
        """The command, as a shell takes it."""
        return shlex.join(["krony", *self.words])

    @property
    def reads(self) -> list[str]:
        """The files and folders that the options name; of a folder with test sets, those that are measured."""
        options = self.section.options
        named = {key: set(values(self.section, (key,))) for key in options}
        if folder := options.get("data-dir"):
            sets = named.get("data", {STANDARD})
            named["data-dir"] = {str(Path(folder) / TEST_SETS[name].file) for name in sets if name in TEST_SETS}
        return sorted(name for name in set().union(*named.values()) if isinstance(name, str) and _exists(name))


def steps_of(recipe: Recipe) -> list[Step]:
    """The steps in their order: each verb takes the last model that was made; eval measures the original too."""
    made, model = [], recipe.model
    for section in recipe.sections:
        if section.verb in ("compress", "heal"):
            out = recipe.out / {"compress": "compressed", "heal": "healed"}[section.verb]
            made.append(Step(name=out.name, section=section, model=model, out=out))
            model = str(out)
        elif section.verb == "eval":
            models = {"eval": model} if model == recipe.model else {"eval-original": recipe.model, "eval": model}
            made += [Step(name=name, section=section, model=each, out=None) for name, each in models.items()]
        else:
            name = "-".join(str(section.options[key]) for key in NAMED_BY if key in section.options) or "dense"
            file = f"{name}.pt" if name == "reference" else name
            made.append(Step(name=name, section=section, model=model, out=recipe.out / file))
    names = [step.name for step in made]
    if twice := next((step for step in made if names.count(step.name) > 1), None):
        raise KronyError(f"{recipe.file}, line {twice.section.line}: two exports to {twice.name}: one is enough")
    return made


class Run:
    """Runs the steps of a recipe in its OUT.

    Args:
        commands: the verbs as typer made them, by name.
    """

    def __init__(self, recipe: Recipe, commands: Mapping[str, Any], to: Output) -> None:
        self.recipe, self.commands, self.to = recipe, commands, to
        self.steps = steps_of(recipe)
        self._digests: dict[str, str] = {}  # of what was read once: a model can be large

    def check(self) -> None:
        """Raises KronyError for what can be known to fail before any work, options that their verb refuses included."""
        config: KronyConfig | None = None
        heals: list[Section] = []
        for step in self.steps:
            command, verb = self.commands[step.section.verb], VERBS[step.section.verb]
            with self._blamed(step), command.make_context(f"krony {step.section.verb}", step.words[1:]) as context:
                made = verb.run.made(context, context.params) if hasattr(verb.run, "made") else context.params
                checked = verb.check(**{name: made[name] for name in inspect.signature(verb.check).parameters})
                check_texts(step.section)
                if step.section.verb == "compress":
                    config = checked
                elif step.section.verb == "heal":
                    heals.append(step.section)
                elif config is not None and step.section.options.get("to") == "slim":
                    check_slim(config, heals)
        for name in dict.fromkeys(
            [self.recipe.model, *(n for step in self.steps for n in values(step.section, MODELS))]
        ):
            ModelSource.find(name)

    def done(self) -> dict[str, Any]:
        """What earlier runs finished: step -> its record and figures. Raises KronyError if OUT is another recipe's."""
        file = self.recipe.out / FIGURES
        if not file.is_file():
            if self.recipe.out.is_dir() and any(self.recipe.out.iterdir()):
                raise KronyError(f"{self.recipe.out} is not empty, and no run of a recipe began it: name a new folder")
            return {}
        found = read_json(file).get("steps")
        if not isinstance(found, dict) or not all(_is_record(record) for record in found.values()):
            raise KronyError(f"{file} is not what a run of a recipe writes: name a new folder")
        for step in self.steps:
            if step.name in found:
                self._check_same(step, found[step.name])
        return found

    def _check_same(self, step: Step, before: Mapping[str, Any]) -> None:
        """Raises KronyError if a step that is done would now be another."""
        now, where = self._record(step), f"{self.recipe.out}: its step {step.name} was made"
        if before["command"] != now["command"]:
            raise KronyError(
                f"{where} by {before['command']}, and the recipe now says {now['command']}: name another out"
            )
        if others := [name for name, digest in now["files"].items() if before["files"].get(name) != digest]:
            raise KronyError(f"{where} from {others[0]}, which has changed since: name another out")

    def go(self) -> dict[str, Any]:
        """Runs what is missing and returns the figures of all steps. Raises what a verb raises, with its line."""
        done = self.done()
        self.recipe.out.mkdir(parents=True, exist_ok=True)
        self._note(done)  # first of all: it says that the folder is this run's
        write_text(self.recipe.out / RECIPE, self.recipe.file.read_text(encoding="utf-8"))
        for number, step in enumerate(self.steps, start=1):
            where = f"{number}/{len(self.steps)} {step.name}"
            if step.name in done:
                self.to.say(f"{where}: done before")
                continue
            if step.out is not None and step.out.exists():
                raise KronyError(f"{step.out} is there, and {FIGURES} does not say how it was made: remove it first")
            self.to.say(f"{where}: {step.command}")
            done[step.name] = self._run(step)
            self._note(done)
        return done

    def _note(self, done: Mapping[str, Any]) -> None:
        """Writes down what is done."""
        write_json(self.recipe.out / FIGURES, {"model": self.recipe.model, "steps": done})

    def _record(self, step: Step) -> dict[str, Any]:
        """What must be the same for the step's result to stay: the command, and what is in the files that it names."""
        own = [self.recipe.model] if step.model == self.recipe.model and Path(step.model).exists() else []
        names = [*own, *step.reads]
        for name in names:
            if name not in self._digests:
                self._digests[name] = digest_of(Path(name))
        return {"command": step.command, "files": {name: self._digests[name] for name in names}}

    def _run(self, step: Step) -> dict[str, Any]:
        """Runs one step, and returns its record."""
        record, file = self._record(step), self.recipe.out / f".{step.name}.json"
        write_text(self.recipe.out / VERSIONS, versions())
        words = [*step.words[1:], f"--json={file}"]
        if (
            step.section.verb == "heal"
            and step.out is not None
            and step.out.with_name(f"{step.out.name}{WORK}").exists()
        ):
            words.append("--resume")
        began = time.perf_counter()
        try:
            with self._blamed(step):
                self.commands[step.section.verb].main(words, prog_name=step.section.verb, standalone_mode=False)
            figures = json.loads(file.read_text(encoding="utf-8"))
        finally:
            file.unlink(missing_ok=True)
        seconds = round(time.perf_counter() - began, 1)
        return record | {"seconds": seconds, "machine": machine(), "figures": figures}

    def _blamed(self, step: Step) -> _Blamed:
        return _Blamed(f"{self.recipe.file}, line {step.section.line}: {step.section.verb}", self.recipe.file)


class _Blamed:
    """Errors in the block name the recipe's section; a stop says how to go on."""

    def __init__(self, where: str, file: Path) -> None:
        self.where, self.file = where, file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Stopped):
            sentence = f"{self.where} is not finished: krony run {self.file} continues there"
            raise Stopped(int(str(error.code)) - 128, sentence) from None
        if isinstance(error, KronyError):
            as_keys = " (in a recipe an option is a key, without the dashes)" if " --" in str(error) else ""
            raise type(error)(f"{self.where}: {error}{as_keys}") from None


def comparison(done: Mapping[str, Any]) -> Table | None:
    """What eval measured, the original beside the result; None where nothing was measured."""
    if "eval" not in done:
        return None
    after = done["eval"]["figures"]["results"]
    before = done.get("eval-original", {}).get("figures", {}).get("results", [])
    if not before:
        return None
    rows = []
    for old, new in zip(before, after, strict=True):
        # JSON has null for an infinite perplexity
        first, last = (math.inf if one["perplexity"] is None else one["perplexity"] for one in (old, new))
        rows.append([old["data"], f"{first:,.2f}", f"{last:,.2f}", f"{last / first:.3f}"])
    return Table(["perplexity", "original", "result", "ratio"], rows)


def versions() -> str:
    """Every installed package with its version, as pip reads them."""
    found = {f"{each.metadata['Name']}=={each.version}" for each in distributions() if each.metadata["Name"]}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def _exists(name: str) -> bool:
    """Whether a file or folder has this name; a regular expression can be longer than any name."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def _is_record(found: Any) -> bool:
    return isinstance(found, dict) and "command" in found and isinstance(found.get("files"), dict)


def digest_of(path: Path) -> str:
    """The digest of a file, or of all files in a folder, without hidden ones: locks lie there while a verb runs."""
    found = hashlib.blake2b(digest_size=16)
    inside = [] if path.is_file() else (each for each in path.iterdir() if not each.name.startswith("."))
    for file in [path] if path.is_file() else sorted(each for each in inside if each.is_file()):
        found.update(file.name.encode())
        with file.open("rb") as stream:
            for piece in iter(lambda: stream.read(1 << 20), b""):
                found.update(piece)
    return found.hexdigest()

"""Tables 5 to 9 and Figure 1: models that are compressed, trained and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from krony.config import KronyConfig
from krony.errors import KronyError
from krony.models.loading import load_model
from krony.reproduce import figures
from krony.reproduce.analogous_scheme import analogous_scheme, load_base, model_sentences, tall_size
from krony.reproduce.figures import SETS, Perplexities
from krony.reproduce.lines import Line, Options, Outcome
from krony.reproduce.trainer import MARKS, Run, TableTrainer, Trained

DISTILGPT2 = "distilbert/distilgpt2"
QUOTED = "the paper's figure, not run"
WAY = "its way, run by krony"

# The paper's schemes by the names of its models. The 96M models of Tables 7 to 9 are section 3.1's.
SCHEMES = {"81M": "768x768", "80M": "1024x256:2", "96M": "3072x384", "92M": "1024x256:4", "TQ": "768x384:4"}


@dataclass(frozen=True)
class TableRow:
    """A row of a table that is run: the paper's name and figures, the run, and the stage they are of."""

    name: str
    paper: Perplexities | None
    run: Run
    stage: str
    note: str = ""


@dataclass(frozen=True)
class TableSetup:
    """What a table works with."""

    options: Options
    base: PreTrainedModel
    schemes: dict[str, str]  # the paper's scheme -> this model's
    target: str

    def run(self, name: str, scheme: str, **changes: object) -> Run:
        """A model of the paper's ``scheme``, or of what is alike here."""
        changes = {"init": "van-loan", "seed": self.options.seed} | changes
        return Run(name, KronyConfig(self.schemes[SCHEMES[scheme]], **changes))  # type: ignore[arg-type]

    @property
    def krony_81m(self) -> Run:
        return self.run("KronyPT-81M", "81M")

    @property
    def classic_96m(self) -> Run:
        """Tables 7, 8 and 9 share its figures: Van Loan, not rescaled (section 4.4)."""
        return self.run("KronyPT-96M-VL", "96M", rescale=False)

    @property
    def scaled_92m(self) -> Run:
        return self.run("KronyPT-92M", "92M")

    @property
    def tqcompressor(self) -> Run:
        """By its code's configuration: odd layers, four factors, the embedding split into quarters, a teacher."""
        changes = {"init": "permuted", "rescale": False, "layers": "odd", "embedding": 4}
        return Run("as TQCompressor", self.run("", "TQ", **changes).config, taught=True)

    @property
    def kngpt2(self) -> Run:
        """Odd layers with their attention, one factor of half the parameters, the embedding in halves, a teacher."""
        changes = {"init": "van-loan", "rescale": False, "layers": "odd", "embedding": 2, "modules": "attn|mlp"}
        return Run("as KnGPT2", KronyConfig("keep=0.5", **changes, seed=self.options.seed), taught=True)  # type: ignore[arg-type]


def table5(options: Options) -> Outcome:
    """The 81M class against DistilGPT2."""
    setup = _bench(options, "table5", "81M", "80M")
    rows = [
        TableRow("KronyPT-81M", figures.TABLE5_81M, setup.krony_81m, "full"),
        TableRow("KronyPT-80M-2-factors", figures.TABLE5_80M, setup.run("KronyPT-80M-2-factors", "80M"), "full"),
    ]
    return _perplexities(setup, "Perplexity of Krony-PT and DistilGPT2", rows, peers=("GPT2", "DistilGPT2"))


def table6(options: Options) -> Outcome:
    """81M against the other Kronecker models: quoted, and their ways run on the same model and text."""
    setup = _bench(options, "table6", "81M", "TQ")
    rows = [
        TableRow("KronyPT-81M", figures.TABLE6_81M, setup.krony_81m, "full"),
        TableRow("TQCompressedGPT2", figures.TQCOMPRESSED, setup.tqcompressor, "full", WAY),
        TableRow("KnGPT-2", figures.KNGPT2, setup.kngpt2, "full", WAY),
    ]
    peers = ("GPT2", "DistilGPT2", "TQCompressedGPT2", "KnGPT-2")
    return _perplexities(setup, "Perplexity against other Kronecker models", rows, peers=peers, counts=True)


def table7(options: Options) -> Outcome:
    """The paper's pruning start against Van Loan, both of section 3.1's shape."""
    setup = _bench(options, "table7", "96M")
    rows = [
        TableRow("KronyPT-96M-prune", figures.PRUNE, setup.run("KronyPT-96M-prune", "96M", init="prune"), "full"),
        TableRow("KronyPT-96M-VL", figures.VAN_LOAN, setup.classic_96m, "full"),
    ]
    return _perplexities(setup, "Pruning start and Van Loan start", rows, peers=("GPT2", "TQCompressedGPT2", "KnGPT-2"))


def table8(options: Options) -> Outcome:
    """One factor by classic Van Loan against four by the rescaled one."""
    setup = _bench(options, "table8", "96M", "92M")
    swapped = "wikitext columns swapped in the paper"
    rows = [
        TableRow("96M classic VL, 1 epoch", figures.TABLE8_96M_EPOCH, setup.classic_96m, "epoch", swapped),
        TableRow("92M adaptive VL, 1 epoch", figures.TABLE8_92M_EPOCH, setup.scaled_92m, "epoch"),
        TableRow("96M classic VL, full training", figures.VAN_LOAN, setup.classic_96m, "full"),
        TableRow("92M adaptive VL, full training", figures.TABLE8_92M, setup.scaled_92m, "full"),
    ]
    return _perplexities(setup, "Multiple factors with normalised scalars", rows, peers=("GPT2",))


def table9(options: Options) -> Outcome:
    """92M after 30 % of the first epoch against 96M after all of it."""
    setup = _bench(options, "table9", "96M", "92M")
    rows = [
        TableRow("96M, 100 % of an epoch", figures.TABLE9_96M, setup.classic_96m, "epoch"),
        TableRow("92M, 30 % of an epoch", figures.TABLE9_92M, setup.scaled_92m, "0.3"),
    ]
    return _perplexities(setup, "Perplexity during the first epoch", rows, peers=("GPT2",))


def figure1(options: Options) -> Outcome:
    """Validation loss over the first 40 % of an epoch; the paper prints a picture and no figures."""
    setup = _bench(options, "figure1", "96M", "92M")
    trainer = TableTrainer(options, setup.base, "figure1")
    runs = {setup.classic_96m: {"0.4"}, setup.scaled_92m: {"0.4"}}
    title = "Negative log-likelihood on validation text, first 40 % of an epoch"
    header = model_sentences(options, setup.schemes) + trainer.plan(runs)
    _announce(options, header)
    if options.dry_run:
        return Outcome("figure1", title, options.model, header)
    names = {"96M, Van Loan": setup.classic_96m, "92M, rescaled": setup.scaled_92m}
    curves, lines = {}, []
    for name, run in names.items():
        done = trainer.run(run, {"0.4"})
        curves[name] = [(share, done.curve[f"{share:g}"]) for share in (0.0, *MARKS)]
        lines += [Line(name, f"{share:.0%} of an epoch, nats", None, loss, digits=3) for share, loss in curves[name]]
    slow, fast = curves.values()
    below = all(f < s for (_, s), (_, f) in zip(slow, fast, strict=True))
    footer = [
        "The paper's curve of 92M lies below that of 96M all the way; "
        + ("so it does here." if below else "here it does not.")
    ]
    return Outcome("figure1", title, options.model, header, lines, footer, curves)


def _bench(options: Options, target: str, *schemes: str) -> TableSetup:
    base = load_base(options, target)
    rows, columns = tall_size(base)
    return TableSetup(options, base, {SCHEMES[s]: analogous_scheme(SCHEMES[s], rows, columns) for s in schemes}, target)


def _perplexities(
    setup: TableSetup, title: str, rows: Sequence[TableRow], *, peers: Sequence[str], counts: bool = False
) -> Outcome:
    """Trains the rows' runs as far as the table needs, and sets them beside the paper's figures."""
    options = setup.options
    trainer = TableTrainer(options, setup.base, setup.target)
    wanted: dict[Run, set[str]] = {}
    for row in rows:
        wanted.setdefault(row.run, {"start"}).add(row.stage)
    header = model_sentences(options, setup.schemes) + trainer.plan(wanted)
    _announce(options, header)
    if options.dry_run:
        return Outcome(setup.target, title, options.model, header)
    ours_base = trainer.base_perplexities()
    lines = [line for peer in peers for line in _peer(options, trainer, peer, ours_base)]
    results: dict[Run, Trained] = {run: trainer.run(run, stages) for run, stages in wanted.items()}
    for row in rows:
        lines += _lines(row.name, row.paper, results[row.run].stages[row.stage], ours_base, options, row.note)
    footer = ["Perplexity by the paper's protocol; of base: divided by the original's own on the same text."]
    if counts:
        footer += [
            f"{run.name}: {done.params:,} parameters, {done.untied:,} with the head apart from the embedding"
            for run, done in results.items()
        ]
    for run, done in results.items():
        start = ", ".join(f"{name} {value:,.2f}" for name, value in zip(SETS, done.stages["start"], strict=True))
        footer.append(f"{run.name} before training: {start}")
    return Outcome(setup.target, title, options.model, header, lines, footer)


def _lines(
    name: str, paper: Perplexities | None, ours: Sequence[float], base: Sequence[float], options: Options, note: str
) -> list[Line]:
    lines = []
    for index, data in enumerate(SETS):
        theirs = None if paper is None else paper[index]
        line = Line(name, data, theirs, ours[index], note=note)
        if not options.is_gpt2:  # another model on other tokens: ratios can be compared, perplexities can't
            ratio = None if theirs is None else theirs / figures.GPT2[index]
            line = Line(name, data, theirs, ours[index], ratio, ours[index] / base[index], note=note)
        lines.append(line)
    return lines


def _peer(options: Options, trainer: TableTrainer, name: str, base: Sequence[float]) -> list[Line]:
    """A row that nobody trains here: the original, or another's model, run where a hub has it and quoted where not."""
    paper = {
        "GPT2": figures.GPT2,
        "DistilGPT2": figures.DISTILGPT2,
        "TQCompressedGPT2": figures.TQCOMPRESSED,
        "KnGPT-2": figures.KNGPT2,
    }[name]
    if name == "GPT2":
        return _lines(name, paper, base, base, options, "" if options.is_gpt2 else f"ours: {options.model}")
    if name == "DistilGPT2" and options.is_gpt2:
        try:
            return _lines(
                name, paper, trainer.perplexities(load_model(DISTILGPT2, device=options.device)), base, options, ""
            )
        except KronyError:
            pass  # no hub: it is quoted
    why = QUOTED
    if name == "DistilGPT2":
        why = f"{QUOTED}: " + ("no hub" if options.is_gpt2 else "it is GPT-2's, and the model is another")
    elif name in ("TQCompressedGPT2", "KnGPT-2"):
        why = f"{QUOTED}: transformers loads no checkpoint of it"
    ratios = [None] * 3 if options.is_gpt2 else [p / g for p, g in zip(paper, figures.GPT2, strict=True)]
    return [
        Line(name, data, value, None, ratio, quoted=True, note=why)
        for data, value, ratio in zip(SETS, paper, ratios, strict=True)
    ]


def _announce(options: Options, header: list[str]) -> None:
    for sentence in header:
        options.say(sentence)

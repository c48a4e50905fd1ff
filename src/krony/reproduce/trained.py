"""Tables 5 to 9 and Figure 1: models that are compressed, trained and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from krony.config import KronyConfig
from krony.errors import KronyError
from krony.models.loading import load_model
from krony.reproduce import figures
from krony.reproduce.analogous_scheme import analogous_scheme, load_base, model_sentences, tall_size
from krony.reproduce.figures import SETS, Perplexities
from krony.reproduce.lines import Line, Outcome
from krony.reproduce.options import TableOptions
from krony.reproduce.recognition import Likeness, likeness
from krony.reproduce.runs import MARKS, Run, Trained
from krony.reproduce.table_trainer import TableTrainer

DISTILGPT2 = "distilbert/distilgpt2"
QUOTED = "the paper's figure, not run"
ITS_METHOD = "its method, run by krony"

# The paper's schemes by the names of its models. The 96M models of Tables 7 to 9 are section 3.1's.
SCHEMES = {"81M": "768x768", "80M": "1024x256:2", "96M": "3072x384", "92M": "1024x256:4", "TQ": "768x384:4"}


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """A row of a table that is run.

    Attributes:
        name: the paper's name.
        paper: the paper's perplexities, in the order of SETS.
        run: the model.
        stage: where in the training the perplexities are measured.
        note: what differs from the paper.
    """

    name: str
    paper: Perplexities | None
    run: Run
    stage: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class TableSetup:
    """What a table works with.

    Attributes:
        options: the model, the text, the budget.
        base: the original.
        like: whether the original is GPT-2.
        schemes: the paper's scheme -> the one for this model.
        target: the table's name.
    """

    options: TableOptions
    base: PreTrainedModel
    like: Likeness
    schemes: dict[str, str]
    target: str

    def run(self, name: str, scheme: str, **changes: Any) -> Run:
        """A model with the paper's ``scheme``, or with the one that corresponds to it."""
        options: dict[str, Any] = {"init": "van-loan", "seed": self.options.seed} | changes
        return Run(name, KronyConfig(self.schemes[SCHEMES[scheme]], **options))

    @property
    def krony_81m(self) -> Run:
        """The 81M model of Tables 5 and 6."""
        return self.run("KronyPT-81M", "81M")

    @property
    def classic_96m(self) -> Run:
        """The 96M model whose figures Tables 7, 8 and 9 share: Van Loan without rescaling (section 4.4)."""
        return self.run("KronyPT-96M-VL", "96M", rescale=False)

    @property
    def scaled_92m(self) -> Run:
        """The 92M model of Tables 8 and 9: four factors with scalars, rescaled."""
        return self.run("KronyPT-92M", "92M")

    @property
    def tqcompressor(self) -> Run:
        """As TQCompressor's code configures it: odd layers, four factors, the embedding in quarters, a teacher."""
        changes = {"init": "permuted", "rescale": False, "layers": "odd", "embedding": 4}
        return Run("as TQCompressor", self.run("", "TQ", **changes).config, taught=True)

    @property
    def kngpt2(self) -> Run:
        """As KnGPT2: odd layers with their attention, one factor with half of the parameters, the embedding in halves,
        a teacher.
        """
        changes: dict[str, Any] = {"init": "van-loan", "rescale": False, "layers": "odd", "modules": "attn|mlp"}
        config = KronyConfig("keep=0.5", **changes, embedding=2, seed=self.options.seed)
        return Run("as KnGPT2", config, taught=True)


def table5(options: TableOptions) -> Outcome:
    """Table 5: the 81M class against DistilGPT2."""
    setup = _set_up(options, "table5", "81M", "80M")
    two = setup.run("KronyPT-80M-2-factors", "80M")
    rows = [
        TableRow(name="KronyPT-81M", paper=figures.TABLE5_81M, run=setup.krony_81m, stage="full"),
        TableRow(name="KronyPT-80M-2-factors", paper=figures.TABLE5_80M, run=two, stage="full"),
    ]
    return _perplexities(setup, "Perplexity of Krony-PT and DistilGPT2", rows, peers=("GPT2", "DistilGPT2"))


def table6(options: TableOptions) -> Outcome:
    """Table 6: 81M against other Kronecker models. Their figures are quoted, and their methods run on the same text."""
    setup = _set_up(options, "table6", "81M", "TQ")
    rows = [
        TableRow(name="KronyPT-81M", paper=figures.TABLE6_81M, run=setup.krony_81m, stage="full"),
        TableRow(
            name="TQCompressedGPT2", paper=figures.TQCOMPRESSED, run=setup.tqcompressor, stage="full", note=ITS_METHOD
        ),
        TableRow(name="KnGPT-2", paper=figures.KNGPT2, run=setup.kngpt2, stage="full", note=ITS_METHOD),
    ]
    peers = ("GPT2", "DistilGPT2", "TQCompressedGPT2", "KnGPT-2")
    return _perplexities(setup, "Perplexity against other Kronecker models", rows, peers=peers, counts=True)


def table7(options: TableOptions) -> Outcome:
    """Table 7: the paper's pruning start against Van Loan, both with section 3.1's shape."""
    setup = _set_up(options, "table7", "96M")
    prune = setup.run("KronyPT-96M-prune", "96M", init="prune")
    rows = [
        TableRow(name="KronyPT-96M-prune", paper=figures.PRUNE, run=prune, stage="full"),
        TableRow(name="KronyPT-96M-VL", paper=figures.VAN_LOAN, run=setup.classic_96m, stage="full"),
    ]
    return _perplexities(setup, "Pruning start and Van Loan start", rows, peers=("GPT2", "TQCompressedGPT2", "KnGPT-2"))


def table8(options: TableOptions) -> Outcome:
    """Table 8: one factor by classic Van Loan against four factors by rescaled Van Loan."""
    setup = _set_up(options, "table8", "96M", "92M")
    classic, adaptive = setup.classic_96m, setup.scaled_92m
    rows = [
        TableRow(
            name="96M classic VL, 1 epoch",
            paper=figures.TABLE8_96M_EPOCH,
            run=classic,
            stage="epoch",
            note="wikitext columns swapped in the paper",
        ),
        TableRow(name="92M adaptive VL, 1 epoch", paper=figures.TABLE8_92M_EPOCH, run=adaptive, stage="epoch"),
        TableRow(name="96M classic VL, full training", paper=figures.VAN_LOAN, run=classic, stage="full"),
        TableRow(name="92M adaptive VL, full training", paper=figures.TABLE8_92M, run=adaptive, stage="full"),
    ]
    return _perplexities(setup, "Multiple factors with normalised scalars", rows, peers=("GPT2",))


def table9(options: TableOptions) -> Outcome:
    """Table 9: 92M after 30 % of the first epoch against 96M after all of it."""
    setup = _set_up(options, "table9", "96M", "92M")
    rows = [
        TableRow(name="96M, 100 % of an epoch", paper=figures.TABLE9_96M, run=setup.classic_96m, stage="epoch"),
        TableRow(name="92M, 30 % of an epoch", paper=figures.TABLE9_92M, run=setup.scaled_92m, stage="0.3"),
    ]
    return _perplexities(setup, "Perplexity during the first epoch", rows, peers=("GPT2",))


def figure1(options: TableOptions) -> Outcome:
    """Figure 1: validation loss over the first 40 % of an epoch. The paper prints a picture and no figures."""
    setup = _set_up(options, "figure1", "96M", "92M")
    trainer = TableTrainer(options, setup.base, "figure1")
    runs = {setup.classic_96m: {"0.4"}, setup.scaled_92m: {"0.4"}}
    title = "Negative log-likelihood on validation text, first 40 % of an epoch"
    header = model_sentences(options, setup.like, setup.schemes) + trainer.plan(runs)
    _announce(options, header)
    if options.dry_run:
        return Outcome(target="figure1", title=title, model=options.model, header=header)
    curves, lines = {}, []
    for name, run in {"96M, Van Loan": setup.classic_96m, "92M, rescaled": setup.scaled_92m}.items():
        done = trainer.run(run, {"0.4"})
        curves[name] = [(share, done.curve[f"{share:g}"]) for share in (0.0, *MARKS)]
        lines += [
            Line(row=name, quantity=f"{share:.0%} of an epoch, nats", paper=None, ours=loss, digits=3)
            for share, loss in curves[name]
        ]
    return Outcome(
        target="figure1",
        title=title,
        model=options.model,
        header=header,
        lines=lines,
        is_gpt2=setup.like.is_gpt2,
        curves=curves,
    )


def _set_up(options: TableOptions, target: str, *schemes: str) -> TableSetup:
    base = load_base(options, target)
    rows, columns = tall_size(base)
    found = {SCHEMES[s]: analogous_scheme(SCHEMES[s], rows, columns) for s in schemes}
    return TableSetup(options=options, base=base, like=likeness(base), schemes=found, target=target)


def _perplexities(
    setup: TableSetup, title: str, rows: Sequence[TableRow], *, peers: Sequence[str], counts: bool = False
) -> Outcome:
    """Trains the rows' runs as far as the table needs, and sets them beside the paper's figures.

    Args:
        setup: what the table works with.
        title: what the table shows.
        rows: the rows to run.
        peers: models that are not trained here.
        counts: also print the parameters, with the head counted once and twice.
    """
    options = setup.options
    trainer = TableTrainer(options, setup.base, setup.target)
    wanted: dict[Run, set[str]] = {}
    for row in rows:
        wanted.setdefault(row.run, {"start"}).add(row.stage)
    header = model_sentences(options, setup.like, setup.schemes) + trainer.plan(wanted)
    _announce(options, header)
    if options.dry_run:
        return Outcome(target=setup.target, title=title, model=options.model, header=header)
    ours_base = trainer.base_perplexities()
    lines = [line for peer in peers for line in _peer(setup, trainer, peer, ours_base)]
    results: dict[Run, Trained] = {run: trainer.run(run, stages) for run, stages in wanted.items()}
    for row in rows:
        lines += _lines(row.name, row.paper, results[row.run].stages[row.stage], ours_base, setup.like, row.note)
    footer = ["Perplexity by the paper's protocol; of base: divided by the original's on the same text."]
    if counts:
        footer += [
            f"{run.name}: {done.params:,} parameters, {done.untied:,} with the head counted separately"
            for run, done in results.items()
        ]
    for run, done in results.items():
        start = ", ".join(f"{name} {value:,.2f}" for name, value in zip(SETS, done.stages["start"], strict=True))
        footer.append(f"{run.name} before training: {start}")
    return Outcome(
        target=setup.target,
        title=title,
        model=options.model,
        header=header,
        lines=lines,
        footer=footer,
        is_gpt2=setup.like.is_gpt2,
    )


def _lines(
    name: str,
    paper: Perplexities | None,
    ours: Sequence[float],
    base: Sequence[float],
    like: Likeness,
    note: str,
) -> list[Line]:
    lines = []
    for index, data in enumerate(SETS):
        theirs = None if paper is None else paper[index]
        line = Line(row=name, quantity=data, paper=theirs, ours=ours[index], note=note)
        if not like.is_gpt2:  # another model on other tokens: ratios can be compared, perplexities can't
            paper_ratio = None if theirs is None else theirs / figures.GPT2[index]
            line = replace(line, paper_ratio=paper_ratio, ratio=ours[index] / base[index])
        lines.append(line)
    return lines


def _peer(setup: TableSetup, trainer: TableTrainer, name: str, base: Sequence[float]) -> list[Line]:
    """A row that is not trained here: the original, or a published model, which is run if the hub has it, or quoted."""
    paper = {
        "GPT2": figures.GPT2,
        "DistilGPT2": figures.DISTILGPT2,
        "TQCompressedGPT2": figures.TQCOMPRESSED,
        "KnGPT-2": figures.KNGPT2,
    }[name]
    options, like = setup.options, setup.like
    if name == "GPT2":
        return _lines(name, paper, base, base, like, "" if like.is_gpt2 else f"ours: {options.model}")
    if name == "DistilGPT2" and like.is_gpt2:
        try:
            distil = trainer.perplexities(load_model(DISTILGPT2, device=options.device))
            return _lines(name, paper, distil, base, like, "")
        except KronyError:
            pass  # no hub: it is quoted
    why = QUOTED
    if name == "DistilGPT2":
        why = f"{QUOTED}: " + ("no hub" if like.is_gpt2 else "it belongs to GPT-2, and the model is another")
    elif name in ("TQCompressedGPT2", "KnGPT-2"):
        why = f"{QUOTED}: transformers loads no checkpoint of it"
    ratios = [None] * 3 if like.is_gpt2 else [p / g for p, g in zip(paper, figures.GPT2, strict=True)]
    return [
        Line(row=name, quantity=data, paper=value, ours=None, paper_ratio=ratio, quoted=True, note=why)
        for data, value, ratio in zip(SETS, paper, ratios, strict=True)
    ]


def _announce(options: TableOptions, header: list[str]) -> None:
    for sentence in header:
        options.say(sentence)

"""``python -m fuzz``: runs cases drawn from a seed, or a case that was kept, and prints the tally."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import tempfile
from pathlib import Path

from fuzz import campaign, trial
from fuzz.cases import Case


def main() -> None:
    asked = argparse.ArgumentParser(prog="python -m fuzz")
    asked.add_argument("files", nargs="*", type=Path, help="cases to run")
    asked.add_argument("--cases", type=int, default=500)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--kinds", nargs="*", default=list(campaign.KINDS), help=", ".join(campaign.KINDS))
    asked.add_argument("--keep", type=Path, default=Path("fuzz-found"), help="folder for the cases that fail")
    options = asked.parse_args()
    with tempfile.TemporaryDirectory() as home:
        sound = campaign.sound_files(Path(home))
        for file in options.files:
            outcome = trial.run(Case.read(file), sound)
            print(f"{file}: {outcome.code}, {outcome.problem or 'as it should be'}\n{outcome.printed}", flush=True)
        if not options.files:
            print(campaign.run(sound, range(options.cases), options.seed, options.keep, options.kinds, say=print))


if __name__ == "__main__":
    main()

"""The evaluation data, where there is any: ``KRONY_DATA``, or ``shared/data`` beside the project's folder."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("KRONY_DATA") or Path(__file__).parents[2] / "shared/data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the data sets are not at {DATA} (KRONY_DATA)")

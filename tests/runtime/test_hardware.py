"""What is said of the machine."""

import torch
import transformers

from krony.runtime.hardware import fast_dtype, machine


def test_a_figure_says_where_it_is_from():
    found = machine()
    assert found["threads"] == torch.get_num_threads() and found["cores"] >= 1 and found["processor"]
    assert found["torch"] == torch.__version__ and found["transformers"] == transformers.__version__


def test_the_fast_dtype_is_one_of_two():
    assert fast_dtype("cpu") in (torch.float32, torch.bfloat16)

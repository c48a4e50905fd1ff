"""The paper's tables: what the paper prints, what krony gets, and the difference."""

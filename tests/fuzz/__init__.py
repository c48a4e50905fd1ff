"""A structure-aware fuzzer of the command line: real verbs on damaged files and hostile names.

A case is a command and a list of edits to a folder of sound files (``sound``), small enough to read, and kept as JSON
(``cases``). ``kinds`` draws cases at random, one file for each kind of input. ``trial`` runs a case in a forked process
and says what is wrong with how it ends. ``corpus`` holds the cases that once found something.

In ``tests``, ``python -m fuzz --cases 500 --seed 3`` runs cases, and ``python -m fuzz FILE.json`` one that was kept.
"""

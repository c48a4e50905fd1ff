"""The command line: ``krony VERB``. One file per verb; each reads its options, calls the library, and prints."""

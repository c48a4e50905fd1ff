"""Initialisations: how factors get their first values, with one file and one record per method."""

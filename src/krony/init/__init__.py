"""Initialisations: how factors get their first values, one file and one record a method."""

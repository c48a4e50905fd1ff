"""Text: named sets, calibration text, and rows to train on."""

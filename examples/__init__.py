"""Programs that show how perparam is used; each runs as `python -m perparam.examples.NAME` and is run by a test."""

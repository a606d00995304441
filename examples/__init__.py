"""Example programs; run one with `python -m perparam.examples.NAME`."""

"""Safetensors files: their headers, their data, and how they are written."""

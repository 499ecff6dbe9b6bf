"""Runs as evidence: folders, result rows, provenance, pairing with the baseline, reports."""

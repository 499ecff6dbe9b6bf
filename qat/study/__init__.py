"""Runs as evidence: designs, pairing with the baseline, the ledger, significance."""

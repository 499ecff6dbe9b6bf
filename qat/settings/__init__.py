"""Typed settings, every check of them, and the command line: the only room that knows OmegaConf.

Nothing here imports torch, so that help and a rejected typo answer at once.
"""

"""Judges scored rows and shows a run: no training code, no torch."""

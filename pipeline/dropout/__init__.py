"""Dropout masks that are a pure function of named coordinates (step, site, sample, ...)."""

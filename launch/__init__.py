"""Starts work elsewhere and later: jobs for schedulers, the registry of models, retraining."""

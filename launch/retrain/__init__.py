"""Scheduled retraining: one command that a timer starts, and that any kill can interrupt."""

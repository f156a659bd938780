"""What W&B shows of a run: exhibits of an evaluation and of a window, and two workspaces."""

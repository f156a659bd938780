"""A run's configuration: its shape, and how it is read from YAML and the command line."""

"""Fine-tune, evaluate and report: everything of a run, from its YAML file to its report."""

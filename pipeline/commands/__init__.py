"""The commands of `masklock`: each reads its arguments, starts its stage and stops."""

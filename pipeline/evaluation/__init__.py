"""The evaluation stage: predict once, then judge with pure functions of what was predicted."""

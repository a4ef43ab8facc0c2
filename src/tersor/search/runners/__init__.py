"""Runners of trials: one after another in this process, or several processes at once. All give the same results."""

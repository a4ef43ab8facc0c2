"""Budgets: what the user allows, the formats that meet it, and the search for the smallest defensible model."""

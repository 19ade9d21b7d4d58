"""Device functions whose meaning is used unchanged by at least two kernel families."""

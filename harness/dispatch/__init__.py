"""Dispatch: which of several device kernels a case goes to, as pure predicates whose every branch can be counted."""

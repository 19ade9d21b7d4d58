"""Loads the attnreg plugin where the project is used from its checkout, uninstalled."""

pytest_plugins = ("harness.plugin", "pytester")

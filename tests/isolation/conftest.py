"""Sessions over toy kernels, as the tests of the plugin have them."""

from __future__ import annotations

from tests.plugin.test_session import toys

__all__ = ["toys"]

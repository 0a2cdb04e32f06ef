"""Kits for tests, ours and yours: volumes whose truth is known in closed form, and conformance tests."""

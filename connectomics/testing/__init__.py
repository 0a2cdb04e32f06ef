"""Test kits: volumes with known ground truth, and checks that any block task must pass; used by our own tests."""

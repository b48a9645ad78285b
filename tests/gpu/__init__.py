"""Every test that needs a GPU: `pytest tests/gpu`; see conftest.py."""

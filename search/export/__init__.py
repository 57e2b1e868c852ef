"""Exporters, one file a runtime."""

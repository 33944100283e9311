"""Strategies side by side: the same job under each, one world after another, one table."""

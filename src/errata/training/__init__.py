"""Loops that train something beside a frozen host."""

"""Measuring: observe a host, score observations. Named apart from the function ``errata.evaluate``."""

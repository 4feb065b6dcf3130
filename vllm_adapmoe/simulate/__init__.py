"""Routing traces of live traffic, and their replay against policies."""

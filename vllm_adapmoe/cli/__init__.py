"""The `adapmoe` command."""
